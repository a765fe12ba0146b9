"""The plans that are compared over the length of the context."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from experiments.config.long_context import LongContextConfig
from experiments.ladder.study import named_policy
from experiments.long_context.records import NATIVE
from experiments.study.tables import percent
from rap_env.context.base import PruningContext
from rap_env.plan import CompressionPlan, as_plan
from rap_env.policies.base import Policy
from rap_env.request import Request


@dataclass(frozen=True)
class PlanSource:
    """Gives the plan of a name for each length.

    Attributes:
        name: Name in tables and figures.
        caches: Level of all caches; ignored with a policy.
        policy: Chooses the plan for a batch of sequences of the length; None for uniform caches.
        budget_fraction: Its budget, as a fraction of the native peak.
    """

    name: str
    caches: str = NATIVE
    policy: Policy | None = None
    budget_fraction: float = 1.0

    def plan(self, context: PruningContext, batch_size: int, length: int) -> CompressionPlan:
        """The plan for sequences of a length."""
        memory = context.memory
        if self.policy is None:
            return CompressionPlan.uniform(memory.facts.num_layers, caches=self.caches)
        request = Request.at_fraction(memory, batch_size, length, self.budget_fraction)
        return as_plan(self.policy.choose(request))


def plan_sources(settings: LongContextConfig, context: PruningContext) -> list[PlanSource]:
    """The sources of all plans, the native one first.

    Raises:
        UnknownNameError: There is no such policy.
    """
    levels = dict.fromkeys([NATIVE, *settings.caches])
    found = [PlanSource(level, level) for level in levels]
    find = lru_cache(lambda name: named_policy(name, context, context.memory))
    for name in settings.policies:
        for fraction in sorted(set(settings.budgets), reverse=True):
            policy = find(name)
            if policy is not None:
                label = Path(name).stem if Path(name).is_file() else name
                title = f"{label} {percent(fraction, 0)}"
                found.append(PlanSource(title, policy=policy, budget_fraction=fraction))
    return found
