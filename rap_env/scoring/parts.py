"""Scores on some windows of a text, for searches that look at most masks only briefly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rap_env.blocks import BlockMask

if TYPE_CHECKING:
    from rap_env.scoring.scorer import MaskScorer


class TextParts:
    """Runs masks on parts of a scorer's text; a scorer of its own serves each part.

    Args:
        scorer: Whose text it is. A mask that it knows on the whole text is not run.
        prefix_cache_bytes: Most bytes of hidden states kept for sharing, were every part kept
            once; a part gets its share of the text.

    Attributes:
        windows_run: Windows that were really run, summed over masks.
    """

    def __init__(self, scorer: MaskScorer, prefix_cache_bytes: int) -> None:
        self._whole = scorer
        self._prefix_cache_bytes = prefix_cache_bytes
        self._scorers: dict[tuple[int, ...], MaskScorer] = {}
        self.windows_run = 0

    @property
    def block_forwards(self) -> float:
        """Blocks that were really run, each counted as the part of the text it was run on."""
        return sum(s.block_forwards * self._share(part) for part, s in self._scorers.items())

    @property
    def full_block_forwards(self) -> float:
        """Blocks that single full passes would have run for the same, counted alike."""
        return sum(s.full_block_forwards * self._share(part) for part, s in self._scorers.items())

    def nll_many(self, masks: Sequence[BlockMask], windows: tuple[int, ...]) -> list[float]:
        """NLL of masks on some windows, nats per token."""
        known = {mask: self._whole.look_up(mask) for mask in masks}
        nll = {m: float(v[list(windows)].mean()) for m, v in known.items() if v is not None}
        missing = [mask for mask in known if mask not in nll]
        if missing:
            part = self._scorer_of(windows)
            ran = part.evaluations
            nll |= dict(zip(missing, part.nll_many(missing), strict=True))
            self.windows_run += (part.evaluations - ran) * len(windows)
        return [nll[mask] for mask in masks]

    def _scorer_of(self, windows: tuple[int, ...]) -> MaskScorer:
        """The scorer of a part: measured once, a mask is known there too."""
        if windows not in self._scorers:
            whole = self._whole
            self._scorers[windows] = type(whole)(
                whole.llm,
                whole.corpus.tokens[list(windows)],
                batch_tokens=whole.batches[0].numel(),
                prefix_cache_bytes=int(self._prefix_cache_bytes * self._share(windows)),
                masks_together=whole.runner.width,
            )
        return self._scorers[windows]

    def _share(self, windows: tuple[int, ...]) -> float:
        return len(windows) / self._whole.num_windows
