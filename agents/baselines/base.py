"""The interface of baselines, what several of them share, and how a choice is measured."""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.policies.base import Policy, PolicyLike
from rap_env.request import Request

if TYPE_CHECKING:
    from rap_env.context.base import PruningContext
    from rap_env.scoring.interface import Scorer

_ROUNDING = 1e-6  # error of a sum of fractions of a text

PlanT = TypeVar("PlanT", Plan, Plan)
"""What a method chooses: masks, or plans over a ladder."""


class CountingPolicy(PolicyLike, Protocol):
    """A policy that counts the masks or plans it had to score.

    Attributes:
        evaluations: Passes over the calibration text that all choices so far needed, rounded up
            for each request. A stored score counts too: the number is what a server with an
            empty score store would have to run.
    """

    evaluations: int

    def choose(self, request: Request) -> Plan:
        """Return a mask or plan for a request, as in `PolicyLike`."""


class AnyBaseline(Policy, Generic[PlanT]):
    """Chooses a mask or plan without learning; counts what it scores.

    Args:
        context: Memory model, scorer and importance of the model that is pruned.
        seed: Seed of everything random in the baseline.

    Attributes:
        name: Name in the registry and in records.
        kv_aware: Whether the baseline counts the KV cache.
        seeded: Whether its choices depend on the seed.
        setup_evaluations: Masks and plans scored once, before the first request.
        table_sha256: Hash of the table of measured plans that it follows; None without one. Rows of
            an older table are not used again.
        source_sha256: Hash of the file that defines a baseline of another package; None for ours.
            Rows of an older file are not used again.
        evaluations: As in `CountingPolicy`.
    """

    kv_aware = True
    seeded = False
    setup_evaluations = 0
    table_sha256: str | None = None
    source_sha256: str | None = None

    def __init__(self, context: PruningContext, seed: int = 0) -> None:
        self.memory = context.memory
        self.scorer = context.scorer
        self.seed = seed
        self.evaluations = 0

    def choose(self, request: Request) -> PlanT:
        """Return the mask or plan for a request.

        Raises:
            InvalidRequestError: The model cannot serve the batch size or the length.
            InfeasibleBudgetError: Nothing fits the budget.
        """
        self.memory.check(request.batch_size, request.seq_len_tokens)
        self._check_feasible(request)
        scores = CountingScorer(self.scorer)
        chosen = self._choose(request, scores)
        self.evaluations += scores.evaluations
        return chosen

    @abstractmethod
    def _check_feasible(self, request: Request) -> None:
        """Raise an `InfeasibleBudgetError` if nothing fits the budget."""

    @abstractmethod
    def _choose(self, request: Request, scores: CountingScorer) -> PlanT:
        """Return the choice; score masks and plans only through `scores`, which counts them."""


class Baseline(AnyBaseline[Plan]):
    """Chooses a mask without learning.

    A baseline removes blocks until the request's peak bytes, KV cache included, are within the
    budget. Only ``dense`` and the baselines that remove a single kind of block may fail to
    reach it.
    """

    def _check_feasible(self, request: Request) -> None:
        self.memory.check_feasible(request)


class CountingScorer:
    """Scores masks and plans for one request and counts the passes over the text that this needs.

    A mask or plan that was scored on the whole text is remembered and counts once.
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
        """NLL of several masks or plans, nats per token; prefixes that they share run once."""
        keys = list(plans)
        new = [key for key in dict.fromkeys(keys) if key not in self._nll]
        if new:
            self._nll |= dict(zip(new, self._scorer.nll_many(new), strict=True))
        return [self._nll[key] for key in keys]

    def nll_on(self, plans: Sequence[Plan], windows: Sequence[int]) -> list[float]:
        """NLL of several masks or plans on some windows, nats per token; not remembered."""
        self._windows += len(plans) * len(windows)
        return self._scorer.nll_on(plans, windows)

    def nll(self, plan: Plan) -> float:
        """NLL of one mask or plan, nats per token."""
        return self.nll_many([plan])[0]

    def best(self, plans: Sequence[PlanT]) -> PlanT:
        """Return the mask or plan with the lowest NLL; the first one of equals."""
        nll = dict(zip(plans, self.nll_many(plans), strict=True))
        return min(nll, key=nll.__getitem__)

    def first_affordable(self, masks: Sequence[Plan], limit: int) -> list[Plan]:
        """Score and return the first masks that keep `evaluations` within `limit`."""
        left = limit - self.evaluations
        chosen = []
        for mask in masks:
            left -= mask not in self._nll
            if left >= 0:
                chosen.append(mask)
        self.nll_many(chosen)
        return chosen


@dataclass(frozen=True)
class MeasuredChoice:
    """A mask or plan chosen for one request, and the cost of choosing it.

    Attributes:
        evaluations: Masks and plans whose scores the choice needed, stored scores included.
        decision_s: Wall time of the choice in seconds. A stored score counts with the time of
            one pass over the calibration text.
    """

    plan: Plan
    evaluations: int
    decision_s: float


def measure_choice(policy: CountingPolicy, request: Request, scorer: Scorer) -> MeasuredChoice:
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


def fits(memory: MemoryModel, mask: Plan, request: Request) -> bool:
    """Whether the request's peak bytes under `mask` are within its budget."""
    return memory.peak_bytes(mask, request) <= request.budget_bytes


def restore_unneeded(
    memory: MemoryModel, mask: Plan, order: Iterable[int], request: Request
) -> Plan:
    """Restore, in `order`, every removed block without which the request still fits."""
    for index in order:
        fewer = Plan(mask.removed - {index})
        if index in mask.removed and fits(memory, fewer, request):
            mask = fewer
    return mask


def price_per_byte(delta_nll: float, useful_bytes: int) -> float:
    """Nats per useful byte of a removal; a negative `delta_nll` is its own price, at any size."""
    return delta_nll / max(useful_bytes, 1) if delta_nll > 0 else delta_nll
