"""Greedy per byte with fewer evaluations: it measures the promising blocks alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from agents.baselines.base import Baseline, CountingScorer, fits, price_per_byte
from rap_env.blocks import BlockMask
from rap_env.importance.rounds import beside
from rap_env.request import Request

_WIDTH = 6
_NEIGHBOURS = 2

Price = Callable[[int, float], float]
"""Nats per useful byte of a block, from its index and the rise in NLL at its removal."""


class LazyPerByteBaseline(Baseline):
    """Greedy per byte that measures blocks again only while one may still be the best.

    After a first scan of all blocks, candidates are taken by their last known price, a few at a
    time and the neighbours of the block removed last before the others, until the best of those
    just measured is no dearer than the next one was last known to be. Minoux's lazy greedy
    algorithm (1978), with prices per byte: exact where losses only grow as the model shrinks,
    which they mostly do, but next to a gap.
    """

    name = "lazy_per_byte"

    def _choose(self, request: Request, scores: CountingScorer) -> BlockMask:
        freed = self.memory.freed_bytes(request)
        mask, last = BlockMask(), None
        known: dict[int, float] = {}
        while not fits(self.memory, mask, request):
            over = self.memory.peak_bytes(mask, request) - request.budget_bytes

            def price(index: int, rise: float, over: int = over) -> float:
                return price_per_byte(rise, min(int(freed[index]), over))

            if last is None:
                measured = _rises(scores, mask, list(range(self.memory.facts.num_blocks)))
            else:
                measured = _promising(scores, mask, known, last, price)
            last = min(measured, key=lambda index: (price(index, measured[index]), index))
            known |= measured
            del known[last]
            mask |= BlockMask.of(last)
        return mask


def _promising(
    scores: CountingScorer, mask: BlockMask, known: Mapping[int, float], last: int, price: Price
) -> dict[int, float]:
    """The rise in NLL at the removal of some kept blocks, the best among them."""
    nearest = beside(last, sorted(known))
    waiting = sorted(known, key=lambda i: (i not in nearest, price(i, known[i]), i))
    measured: dict[int, float] = {}
    width = _WIDTH + _NEIGHBOURS
    while waiting:
        now, waiting, width = waiting[:width], waiting[width:], _WIDTH
        measured |= _rises(scores, mask, now)
        best = min(price(index, rise) for index, rise in measured.items())
        if waiting and best <= price(waiting[0], known[waiting[0]]):
            break
    return measured


def _rises(scores: CountingScorer, mask: BlockMask, blocks: list[int]) -> dict[int, float]:
    """The rise in NLL if each of some blocks goes as well, nats per token."""
    nll = scores.nll(mask)
    without = scores.nll_many([mask | BlockMask.of(index) for index in blocks])
    return {index: value - nll for index, value in zip(blocks, without, strict=True)}
