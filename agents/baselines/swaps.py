"""Greedy per byte, then swaps of two blocks as long as they help."""

from __future__ import annotations

from agents.baselines.base import Baseline, Tally, fits
from agents.baselines.bench import Bench
from agents.baselines.greedy import greedy_per_byte
from rap_env.blocks import BlockMask
from rap_env.request import Request


class GreedySwapsBaseline(Baseline):
    """Starts with the mask of `greedy_per_byte` and searches its surroundings at equal bytes.

    Every removed block is put back in turn, first the one whose return lowers the loss most;
    the mask without it and with any other block removed instead is scored, where it fits. The
    best of these is taken if it is better, and all begins again. Ends when no swap helps, or
    with the evaluations.

    Args:
        context: The model's memory and scores.
        seed: Not used: nothing is random.
        extra_evaluations: Most masks scored for a request after those of the greedy search.
    """

    name = "greedy_swaps"

    def __init__(self, context: Bench, seed: int = 0, extra_evaluations: int = 500) -> None:
        super().__init__(context, seed)
        self.extra_evaluations = extra_evaluations

    def _choose(self, request: Request) -> tuple[BlockMask, int]:
        if fits(self.memory, BlockMask(), request):
            return BlockMask(), 0
        tally = Tally(self.scorer)
        mask = greedy_per_byte(self.memory, tally, request)
        most = tally.evaluations + self.extra_evaluations
        while (better := self._improved(mask, tally, most, request)) is not None:
            mask = better
        return mask, tally.evaluations

    def _improved(
        self, mask: BlockMask, tally: Tally, most: int, request: Request
    ) -> BlockMask | None:
        """A better mask one swap away, None where none is left or none can be paid for."""
        without = _affordable([mask - BlockMask.of(index) for index in mask], tally, most)
        for fewer in sorted(without, key=tally.nll):
            near = _affordable(self._swaps(fewer, mask, request), tally, most)
            if near and tally.nll(best := tally.best(near)) < tally.nll(mask):
                return best
        return None

    def _swaps(self, fewer: BlockMask, mask: BlockMask, request: Request) -> list[BlockMask]:
        """Masks that fit with one block put back: as it is, or another one removed instead."""
        blocks = range(self.memory.facts.num_blocks)
        grown = [fewer | BlockMask.of(index) for index in blocks if index not in mask]
        return [near for near in (fewer, *grown) if fits(self.memory, near, request)]


def _affordable(masks: list[BlockMask], tally: Tally, most: int) -> list[BlockMask]:
    """The first of some masks, as many as may still be scored; now they are."""
    left = most - tally.evaluations
    chosen = []
    for mask in masks:
        left -= not tally.knows(mask)
        if left >= 0:
            chosen.append(mask)
    tally.nll_many(chosen)
    return chosen
