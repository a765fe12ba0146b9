"""What every way of choosing a mask gives, and what it is given."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from rap_env.blocks import Block, BlockMask
from rap_env.memory import MemoryModel
from rap_env.workload import Request


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


class Scorer(Protocol):
    """The part of `rap_env.scoring.MaskScorer` that choosing needs."""

    evaluations: int

    @property
    def block_forwards(self) -> float:
        """Blocks that were run on the whole text; on a part of it, that part."""

    @property
    def evaluation_s(self) -> float:
        """Seconds of one pass over the text."""

    @property
    def dense_nll(self) -> float:
        """NLL of the dense model, nats per token."""

    def scan(self, mask: BlockMask) -> Mapping[Block, float]:
        """For every kept block: the NLL without it too, nats per token."""


class OneShot(Protocol):
    """The part of `rap_env.importance.OneShotProfile` that choosing needs."""

    @property
    def loss_rise(self) -> npt.NDArray[np.float64]:
        """Loss if one block is removed from the dense model, nats per token, shape (2L,)."""

    @property
    def block_influence(self) -> npt.NDArray[np.float64]:
        """ShortGPT's influence of each block, shape (2L,)."""


class GSI(Protocol):
    """The part of `rap_env.importance.GSIProfile` that choosing needs."""

    @property
    def full_order(self) -> tuple[int, ...]:
        """All blocks: in order of removal, the rest by the losses of the last round."""

    @property
    def evaluations(self) -> int:
        """Masks that were run to find the order."""


class Bench(Protocol):
    """The part of `rap_env.workbench.Workbench` that choosing needs."""

    @property
    def memory(self) -> MemoryModel:
        """Byte arithmetic of the model."""

    @property
    def scorer(self) -> Scorer:
        """Scores on the calibration text."""

    @property
    def one_shot(self) -> OneShot:
        """Importance measured from the dense model."""

    @property
    def gsi(self) -> GSI | None:
        """The GSI order, if there is one."""


class Baseline(ABC):
    """A way to choose a mask for a request without learning.

    Removal goes on until the request's peak bytes, KV cache included, are within budget.

    Args:
        workbench: The model's memory, scores and importance.
        seed: Seed of what is random in it.
    """

    name: ClassVar[str]
    kv_aware: ClassVar[bool] = True

    def __init__(self, workbench: Bench, seed: int = 0) -> None:
        self.memory = workbench.memory
        self.scorer = workbench.scorer
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
        ran, forwards = self.scorer.evaluations, self.scorer.block_forwards
        start = time.perf_counter()
        mask, evaluations = self._choose(request)
        decision_s = time.perf_counter() - start
        stored = evaluations - (self.scorer.evaluations - ran)
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


def fits(memory: MemoryModel, mask: BlockMask, request: Request) -> bool:
    """Whether the request's peak bytes under `mask` are within its budget."""
    return memory.peak_bytes(mask, request) <= request.budget_bytes


def remove_until_fits(memory: MemoryModel, order: Iterable[int], request: Request) -> BlockMask:
    """Remove blocks in the given order until the request fits or the order ends."""
    mask = BlockMask()
    for index in order:
        if fits(memory, mask, request):
            break
        mask |= BlockMask.of(index)
    return mask
