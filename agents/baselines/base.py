"""What every way of choosing a mask gives, and what several of them need."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from agents.baselines.bench import Bench, Scorer
from rap_env.blocks import BlockMask
from rap_env.memory import MemoryModel
from rap_env.request import Request

_ROUNDING = 1e-6  # of sums of parts of a text


@dataclass(frozen=True)
class MaskChoice:
    """A mask chosen for one request, and what the choice cost.

    Attributes:
        mask: The blocks to remove.
        evaluations: Masks whose score the choice needed, a score kept from before counted too:
            what a server with an empty store would have to run for this request.
        block_forwards: Blocks that were really run on the calibration text meanwhile.
        decision_s: Wall time of the choice in seconds. A score that was kept from before counts
            with the time of one pass over the calibration text (no less than it took).
        fits: Whether the request fits its budget under `mask`; False only where the method
            cannot reach it (``dense``, or one kind of block alone).
    """

    mask: BlockMask
    evaluations: int
    block_forwards: float
    decision_s: float
    fits: bool = True


class Baseline(ABC):
    """A way to choose a mask for a request without learning.

    Removal goes on until the request's peak bytes, KV cache included, are within budget.

    Args:
        context: The model's memory, scores and importance.
        seed: Seed of what is random in it.

    Attributes:
        name: What it is called.
        kv_aware: Whether it counts the KV cache.
        seeded: Whether what it chooses depends on the seed.
    """

    name: ClassVar[str]
    kv_aware: ClassVar[bool] = True
    seeded: ClassVar[bool] = False

    def __init__(self, context: Bench, seed: int = 0) -> None:
        self.memory = context.memory
        self.scorer = context.scorer
        self.seed = seed

    @property
    def setup_evaluations(self) -> int:
        """Masks that had to be scored once, before the first request; 0 if none."""
        return 0

    def select(self, request: Request) -> MaskChoice:
        """Choose the blocks to remove for `request`.

        Raises:
            InvalidRequestError: The batch or the length does not suit the model.
            InfeasibleBudgetError: No mask at all fits the budget.
        """
        self.memory.check(request.batch_size, request.seq_len_tokens)
        self.memory.check_feasible(request)
        ran, forwards = self.scorer.passes, self.scorer.block_forwards
        start = time.perf_counter()
        mask, evaluations = self._choose(request)
        decision_s = time.perf_counter() - start
        stored = evaluations - math.ceil(self.scorer.passes - ran - _ROUNDING)
        if stored > 0:  # a search is not quick because somebody ran it before
            decision_s += stored * self.scorer.evaluation_s
        return MaskChoice(
            mask=mask,
            evaluations=evaluations,
            block_forwards=self.scorer.block_forwards - forwards,
            decision_s=decision_s,
            fits=fits(self.memory, mask, request),
        )

    @abstractmethod
    def _choose(self, request: Request) -> tuple[BlockMask, int]:
        """The mask, and how many masks had to be scored to find it."""


class Tally:
    """Scores masks and counts them, each once.

    Args:
        scorer: What scores them.
    """

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self._nll: dict[BlockMask, float] = {}

    @property
    def evaluations(self) -> int:
        """Different masks asked for so far."""
        return len(self._nll)

    def nll_many(self, masks: Sequence[BlockMask]) -> list[float]:
        """NLL of several masks, nats per token; what they share runs once."""
        new = [mask for mask in dict.fromkeys(masks) if mask not in self._nll]
        if new:
            self._nll |= dict(zip(new, self._scorer.nll_many(new), strict=True))
        return [self._nll[mask] for mask in masks]

    def knows(self, mask: BlockMask) -> bool:
        """Whether a mask was asked for already."""
        return mask in self._nll

    def nll(self, mask: BlockMask) -> float:
        """NLL of one mask, nats per token."""
        return self.nll_many([mask])[0]

    def best(self, masks: Sequence[BlockMask]) -> BlockMask:
        """The mask of least NLL; of equals the first."""
        nll = dict(zip(masks, self.nll_many(masks), strict=True))
        return min(nll, key=nll.__getitem__)


def fits(memory: MemoryModel, mask: BlockMask, request: Request) -> bool:
    """Whether the request's peak bytes under `mask` are within its budget."""
    return memory.peak_bytes(mask, request) <= request.budget_bytes


def put_back_needless(
    memory: MemoryModel, mask: BlockMask, order: Iterable[int], request: Request
) -> BlockMask:
    """Put back every removed block that the request fits without, in the given order.

    Args:
        memory: Byte arithmetic of the model.
        mask: A mask under which the request fits.
        order: Blocks, those first that are best put back; others stay removed.
        request: The request.
    """
    for index in order:
        fewer = mask - BlockMask.of(index)
        if index in mask and fits(memory, fewer, request):
            mask = fewer
    return mask


def price_per_byte(loss_rise: float, useful_bytes: int) -> float:
    """Nats per useful byte; a removal that lowers the loss is better the more it lowers it."""
    return loss_rise / max(useful_bytes, 1) if loss_rise > 0 else loss_rise
