"""The interface of everything that scores masks: a live model's scorer and a score table's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from rap_env.blocks import Block, BlockMask


class Scorer(Protocol):
    """Gives the NLL of masks on one text.

    `rap_env.scoring.scorer.MaskScorer` measures it with a live model;
    `rap_env.scoring.score_table.TableScorer` reads it from a score table.
    """

    @property
    def context(self) -> Mapping[str, Any]:
        """Everything that determines a score: model, dtype, text, device, versions."""

    @property
    def dense_nll(self) -> float:
        """NLL of the dense model, nats per token."""

    @property
    def known(self) -> int:
        """Number of masks asked for so far, including stored ones."""

    @property
    def evaluations(self) -> int:
        """Number of masks that were run through the model; stored scores do not count."""

    @property
    def passes(self) -> float:
        """As `evaluations`, but a mask run on a part of the text counts as that part."""

    @property
    def block_forwards(self) -> float:
        """Blocks that the model ran, in passes over the whole text; parts count by their share."""

    @property
    def num_windows(self) -> int:
        """Number of windows of the text."""

    @property
    def evaluation_s(self) -> float:
        """Seconds that one pass over the text takes."""

    def is_predicted(self, mask: BlockMask, /) -> bool:
        """Whether the score of `mask` is a prediction rather than a measurement."""

    def nll(self, mask: BlockMask) -> float:
        """Mean NLL of the text under `mask`, nats per token.

        Raises:
            UnknownNameError: The mask names blocks that the model does not have.
            NonFiniteScoreError: The model gave NaN or infinity.
        """

    def nll_many(
        self, masks: Sequence[BlockMask], on_score: Callable[[BlockMask], None] | None = None
    ) -> list[float]:
        """NLL of several masks, in their order; `on_score` is called after each one."""

    def nll_on(self, masks: Sequence[BlockMask], windows: Sequence[int], /) -> list[float]:
        """NLL of several masks on some windows of the text only, nats per token."""

    def scan(
        self, mask: BlockMask, on_score: Callable[[BlockMask], None] | None = None
    ) -> dict[Block, float]:
        """For every block that `mask` keeps: the NLL if that block is removed too."""
