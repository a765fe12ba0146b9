"""Beam search: several masks grow side by side."""

from __future__ import annotations

from agents.baselines.base import Baseline, Tally, fits, price_per_byte
from agents.baselines.bench import Bench
from rap_env.blocks import BlockMask
from rap_env.request import Request


class BeamBaseline(Baseline):
    """Grows the `width` masks whose loss is least per useful byte that they free.

    In each round every mask of the beam that does not fit yet is scored without each further
    block, and the best of all these go on, a mask that fits staying as it is. Bytes beyond what
    the request needs count for nothing, so among masks that fit the loss decides. Ends when the
    whole beam fits, and gives the least loss of all masks that fit and were scored. About
    `width` times the evaluations of `greedy_per_byte`.

    Args:
        context: The model's memory and scores.
        seed: Not used: nothing is random.
        width: Masks in the beam, at least 1.
    """

    name = "beam"

    def __init__(self, context: Bench, seed: int = 0, width: int = 4) -> None:
        super().__init__(context, seed)
        self.width = width

    def _choose(self, request: Request) -> tuple[BlockMask, int]:
        tally = Tally(self.scorer)
        beam, ended = [BlockMask()], set[BlockMask]()
        while open_ones := [mask for mask in beam if not fits(self.memory, mask, request)]:
            grown = [child for mask in open_ones for child in self._children(mask)]
            masks = list(dict.fromkeys([*(m for m in beam if m not in open_ones), *grown]))
            tally.nll_many([BlockMask(), *masks])  # all at once: much of them is shared
            ended |= {mask for mask in masks if fits(self.memory, mask, request)}
            beam = sorted(masks, key=lambda m: self._price(tally, m, request))[: self.width]
        best = tally.best(sorted(ended, key=tuple)) if ended else BlockMask()
        return best, tally.evaluations

    def _children(self, mask: BlockMask) -> list[BlockMask]:
        blocks = range(self.memory.facts.num_blocks)
        return [mask | BlockMask.of(index) for index in blocks if index not in mask]

    def _price(self, tally: Tally, mask: BlockMask, request: Request) -> float:
        """Loss of a mask per useful byte."""
        dense_bytes = self.memory.dense_peak_bytes(request.batch_size, request.seq_len_tokens)
        freed = dense_bytes - self.memory.peak_bytes(mask, request)
        loss = tally.nll(mask) - tally.nll(BlockMask())
        return price_per_byte(loss, min(freed, dense_bytes - request.budget_bytes))
