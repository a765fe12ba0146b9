"""The interface of baselines, what several of them share, and how a choice is measured."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from rap_env.blocks import BlockMask
from rap_env.memory import MemoryModel
from rap_env.policy import PlanPolicy
from rap_env.request import Request

if TYPE_CHECKING:
    from rap_env.context.base import PruningContext
    from rap_env.scoring.interface import Scorer

_ROUNDING = 1e-6  # error of a sum of fractions of a text


class CountingPolicy(PlanPolicy, Protocol):
    """A policy that counts the masks it had to score.

    Attributes:
        evaluations: Passes over the calibration text that all choices so far needed, rounded up
            for each request. A stored score counts too: the number is what a server with an
            empty score store would have to run.
    """

    evaluations: int

    def choose(self, request: Request) -> BlockMask:
        """Return a mask for a request, as in `PlanPolicy`."""


class Baseline(ABC):
    """Chooses a mask without learning; implements `CountingPolicy`.

    A baseline removes blocks until the request's peak bytes, KV cache included, are within the
    budget. Only ``dense`` and the baselines that remove a single kind of block may fail to
    reach it.

    Args:
        context: Memory model, scorer and importance of the model that is pruned.
        seed: Seed of everything random in the baseline.

    Attributes:
        name: Name in the registry and in records.
        kv_aware: Whether the baseline counts the KV cache.
        seeded: Whether its choices depend on the seed.
        setup_evaluations: Masks scored once, before the first request.
        evaluations: As in `CountingPolicy`.
    """

    name: str
    kv_aware = True
    seeded = False
    setup_evaluations = 0

    def __init__(self, context: PruningContext, seed: int = 0) -> None:
        self.memory = context.memory
        self.scorer = context.scorer
        self.seed = seed
        self.evaluations = 0

    def choose(self, request: Request) -> BlockMask:
        """Return the blocks to remove for a request.

        Raises:
            InvalidRequestError: The model cannot serve the batch size or the length.
            InfeasibleBudgetError: No mask fits the budget.
        """
        self.memory.check(request.batch_size, request.seq_len_tokens)
        self.memory.check_feasible(request)
        scores = CountingScorer(self.scorer)
        mask = self._choose(request, scores)
        self.evaluations += scores.evaluations
        return mask

    @abstractmethod
    def _choose(self, request: Request, scores: CountingScorer) -> BlockMask:
        """Return the mask; score masks only through `scores`, which counts them."""


class CountingScorer:
    """Scores masks for one request and counts the passes over the text that this needs.

    A mask that was scored on the whole text is remembered and counts once.
    """

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self._nll: dict[BlockMask, float] = {}
        self._windows = 0  # scored on a part of the text

    @property
    def num_windows(self) -> int:
        """Windows of the text."""
        return self._scorer.num_windows

    @property
    def evaluations(self) -> int:
        """Passes over the whole text so far, rounded up; a part of the text counts as that part."""
        return len(self._nll) + -(-self._windows // self.num_windows)

    def nll_many(self, masks: Sequence[BlockMask]) -> list[float]:
        """NLL of several masks, nats per token; common prefixes of the masks run once."""
        new = [mask for mask in dict.fromkeys(masks) if mask not in self._nll]
        if new:
            self._nll |= dict(zip(new, self._scorer.nll_many(new), strict=True))
        return [self._nll[mask] for mask in masks]

    def nll_on(self, masks: Sequence[BlockMask], windows: Sequence[int]) -> list[float]:
        """NLL of several masks on some windows of the text, nats per token; not remembered."""
        self._windows += len(masks) * len(windows)
        return self._scorer.nll_on(masks, windows)

    def nll(self, mask: BlockMask) -> float:
        """NLL of one mask, nats per token."""
        return self.nll_many([mask])[0]

    def best(self, masks: Sequence[BlockMask]) -> BlockMask:
        """Return the mask with the lowest NLL; the first one of equals."""
        nll = dict(zip(masks, self.nll_many(masks), strict=True))
        return min(nll, key=nll.__getitem__)

    def first_affordable(self, masks: Sequence[BlockMask], limit: int) -> list[BlockMask]:
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
    """A mask chosen for one request, and the cost of choosing it.

    Attributes:
        evaluations: Masks whose scores the choice needed, stored scores included.
        decision_s: Wall time of the choice in seconds. A stored score counts with the time of
            one pass over the calibration text.
    """

    mask: BlockMask
    evaluations: int
    decision_s: float


def measure_choice(policy: CountingPolicy, request: Request, scorer: Scorer) -> MeasuredChoice:
    """Let a policy choose a mask, and measure the cost; `scorer` is the one that it uses."""
    counted, ran = policy.evaluations, scorer.passes
    start = time.perf_counter()
    mask = policy.choose(request)
    decision_s = time.perf_counter() - start
    evaluations = policy.evaluations - counted
    stored = evaluations - math.ceil(scorer.passes - ran - _ROUNDING)
    if stored > 0:  # a stored score does not make the search itself faster
        decision_s += stored * scorer.evaluation_s
    return MeasuredChoice(mask, evaluations, decision_s)


def fits(memory: MemoryModel, mask: BlockMask, request: Request) -> bool:
    """Whether the request's peak bytes under `mask` are within its budget."""
    return memory.peak_bytes(mask, request) <= request.budget_bytes


def restore_unneeded(
    memory: MemoryModel, mask: BlockMask, order: Iterable[int], request: Request
) -> BlockMask:
    """Restore, in `order`, every removed block without which the request still fits."""
    for index in order:
        fewer = mask - BlockMask.of(index)
        if index in mask and fits(memory, fewer, request):
            mask = fewer
    return mask


def price_per_byte(delta_nll: float, useful_bytes: int) -> float:
    """Nats per useful byte of a removal; a negative `delta_nll` is its own price, at any size."""
    return delta_nll / max(useful_bytes, 1) if delta_nll > 0 else delta_nll
