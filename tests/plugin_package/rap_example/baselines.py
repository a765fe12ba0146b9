"""A baseline: derives from `Baseline` (masks) or `LadderBaseline` (plans)."""

from agents.baselines import Baseline
from agents.baselines.base import CountingScorer
from rap_env.plan import Plan
from rap_env.request import Request
from rap_example.policies import LargestFirst


class LargestFirstBaseline(Baseline):
    """Removes the blocks that free most bytes; scores nothing."""

    name = "largest_first"

    def _choose(self, request: Request, scores: CountingScorer) -> Plan:
        return LargestFirst(self.memory).choose(request)
