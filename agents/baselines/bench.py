"""What a way of choosing a mask is given: the parts of a context that it needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from rap_env.blocks import BlockMask
from rap_env.memory import MemoryModel
from rap_env.request import Request


class Scorer(Protocol):
    """The part of `rap_env.scoring.MaskScorer` that choosing needs."""

    @property
    def passes(self) -> float:
        """Masks that were really run; one run on a part of the text counts as that part."""

    @property
    def num_windows(self) -> int:
        """Windows of the text."""

    @property
    def block_forwards(self) -> float:
        """Blocks that were run on the whole text; on a part of it, that part."""

    @property
    def evaluation_s(self) -> float:
        """Seconds of one pass over the text."""

    def nll_many(self, masks: Sequence[BlockMask]) -> list[float]:
        """NLL of several masks, nats per token."""

    def nll_on(self, masks: Sequence[BlockMask], windows: Sequence[int]) -> list[float]:
        """NLL of several masks on some windows of the text alone, nats per token."""


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


class Frontier(Protocol):
    """The part of `rap_env.importance.frontier.Frontier` that choosing needs."""

    @property
    def evaluations(self) -> int:
        """Masks that had to be scored to build it."""

    def best(self, memory: MemoryModel, request: Request) -> BlockMask | None:
        """The known mask of least loss under which the request fits, if there is one."""


class Bench(Protocol):
    """The part of `rap_env.context.PruningContext` that choosing needs."""

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

    @property
    def layer_influence(self) -> npt.NDArray[np.float64]:
        """ShortGPT's influence of each whole layer, shape (L,)."""

    @property
    def frontier(self) -> Frontier:
        """The best known masks by how many blocks of each kind they remove."""
