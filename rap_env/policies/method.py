"""The base of methods: policies that are made from a context, and that may score plans to choose.

A method is one class: it derives from `Method`, has a `name` and a `_choose`, and registers
itself. It is then compared (``evaluate.baselines``), served, exported and listed by that
name.
"""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rap_env.ladder.ladder_bytes import LadderBytes
from rap_env.ladder.state import LadderCosts
from rap_env.plan import Plan
from rap_env.policies.base import Policy
from rap_env.request import Request

if TYPE_CHECKING:
    from rap_env.context.base import PruningContext, Scorer

_ROUNDING = 1e-6  # error of a sum of fractions of a text


class Basis(NamedTuple):
    """What a method is made from.

    Attributes:
        context: Memory arithmetic, scorer and importance of the model.
        ladder_bytes: The ladder over which it chooses, with its bytes.
        seed: Seed of everything random in it.
        workload: Requests to tune on, as `rap_env.workload.make_sampler` takes it.
    """

    context: PruningContext
    ladder_bytes: LadderBytes
    seed: int = 0
    workload: str | Mapping[str, Any] = "tight"


class Method(Policy):
    """Chooses plans over a ladder, without learning.

    It lowers items until the request's peak bytes, KV cache included, are within the budget,
    and nothing where the native model fits. Only methods that remove blocks of one kind may
    fail to reach the budget. On the ladder whose levels are native and removed
    (``Ladder.of(facts, "masks")``), its plans are masks.

    Args:
        basis: The model with its scores, and the ladder. A method that needs something of it
            for all requests takes it in its own constructor.
    """

    def __init__(self, basis: Basis) -> None:
        self.context, self.ladder_bytes, self.seed, _ = basis
        self.memory = self.context.memory
        self.ladder = self.ladder_bytes.ladder
        self.weight_levels = self.ladder.weight_levels

    def choose(self, request: Request) -> Plan:
        """Return the plan for a request.

        Raises:
            InvalidRequestError: The model cannot serve the batch size or the length.
            InfeasibleBudgetError: Nothing in the ladder fits the budget.
        """
        self.ladder_bytes.check_feasible(request)
        if self.fits(Plan(), request):
            return Plan()
        scores = CountingScorer(self.context.scorer)
        plan = self._choose(request, scores)
        self.evaluations += scores.evaluations
        return plan

    @abstractmethod
    def _choose(self, request: Request, scores: CountingScorer) -> Plan:
        """Return the plan for a request that the native model does not fit.

        Score plans only through `scores`, which counts them.
        """

    def costs(self, request: Request) -> LadderCosts:
        """The bytes of each item at each level for a request."""
        return self.ladder_bytes.costs(request.batch_size, request.seq_len_tokens)

    def fits(self, plan: Plan, request: Request) -> bool:
        """Whether the request's peak bytes under a plan are within its budget."""
        return self.memory.peak_bytes(plan, request) <= request.budget_bytes

    def remove(self, groups: Iterable[Sequence[int]], request: Request) -> Plan:
        """Remove groups of blocks, given by index, in order until the request fits."""
        plans = accumulate(groups, lambda plan, blocks: plan.without(*blocks), initial=Plan())
        return self.memory.first_that_fits(plans, request)

    def random(self, request: Request) -> np.random.Generator:
        """A generator that depends on the seed and the request alone."""
        key = [self.seed, request.batch_size, request.seq_len_tokens, request.budget_bytes]
        return np.random.default_rng(key)


class CountingScorer:
    """Scores plans for one request and counts the passes over the text that this needs.

    A plan that was scored on the whole text is remembered and counts once.
    """

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self._nll: dict[Plan, float] = {}
        self._windows = 0  # scored on a part of the text

    @property
    def num_windows(self) -> int:
        """Windows of the text."""
        return self._scorer.num_windows

    @property
    def evaluations(self) -> int:
        """Passes over the whole text so far, rounded up; a part of the text counts as that part."""
        return len(self._nll) + -(-self._windows // self.num_windows)

    def nll_many(self, plans: Sequence[Plan]) -> list[float]:
        """NLL of several plans, nats per token; prefixes that they share run once."""
        new = [plan for plan in dict.fromkeys(plans) if plan not in self._nll]
        if new:
            self._nll |= dict(zip(new, self._scorer.nll_many(new), strict=True))
        return [self._nll[plan] for plan in plans]

    def nll_on(self, plans: Sequence[Plan], windows: Sequence[int]) -> list[float]:
        """NLL of several plans on some windows, nats per token; not remembered."""
        self._windows += len(plans) * len(windows)
        return self._scorer.nll_on(plans, windows)

    def nll(self, plan: Plan) -> float:
        """NLL of one plan, nats per token."""
        return self.nll_many([plan])[0]

    def best(self, plans: Sequence[Plan]) -> Plan:
        """Return the plan with the lowest NLL; the first one of equals."""
        nll = dict(zip(plans, self.nll_many(plans), strict=True))
        return min(nll, key=nll.__getitem__)


@dataclass(frozen=True)
class MeasuredChoice:
    """A plan chosen for one request, and the cost of choosing it.

    Attributes:
        evaluations: Plans whose scores the choice needed, stored scores included.
        decision_s: Wall time of the choice in seconds. A stored score counts with the time of
            one pass over the calibration text.
    """

    plan: Plan
    evaluations: int
    decision_s: float


def measure_choice(policy: Policy, request: Request, scorer: Scorer) -> MeasuredChoice:
    """Let a policy choose, and measure the cost; `scorer` is the one that it uses."""
    counted, ran = policy.evaluations, scorer.passes
    start = time.perf_counter()
    plan = policy.choose(request)
    decision_s = time.perf_counter() - start
    evaluations = policy.evaluations - counted
    stored = evaluations - math.ceil(scorer.passes - ran - _ROUNDING)
    if stored > 0:  # a stored score does not make the search itself faster
        decision_s += stored * scorer.evaluation_s
    return MeasuredChoice(plan, evaluations, decision_s)


def price_per_byte(delta_nll: float, useful_bytes: int) -> float:
    """Nats per useful byte of a step; a negative `delta_nll` is its own price, at any size."""
    return delta_nll / max(useful_bytes, 1) if delta_nll > 0 else delta_nll
