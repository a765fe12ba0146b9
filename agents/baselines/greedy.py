"""Greedy per byte: importance measured again after each removal."""

from __future__ import annotations

from agents.baselines.base import Baseline, Tally, fits, price_per_byte
from rap_env.blocks import BlockMask
from rap_env.memory import MemoryModel
from rap_env.request import Request


class GreedyPerByteBaseline(Baseline):
    """Removes, again and again, the block whose loss rise is least per byte that it frees.

    Bytes beyond what the request still needs count for nothing, so of several blocks that
    each suffice alone the one with the least loss goes last, however large another is. Every
    removal is followed by a scan of all kept blocks: for N blocks and k removals about
    ``k * N`` evaluations for each request.
    """

    name = "greedy_per_byte"

    def _choose(self, request: Request) -> tuple[BlockMask, int]:
        tally = Tally(self.scorer)
        return greedy_per_byte(self.memory, tally, request), tally.evaluations


def greedy_per_byte(memory: MemoryModel, tally: Tally, request: Request) -> BlockMask:
    """The mask that removals at the least price, measured anew after each, lead to."""
    freed = memory.freed_bytes(request)
    mask = BlockMask()
    while not fits(memory, mask, request):
        over = memory.peak_bytes(mask, request) - request.budget_bytes
        nll = tally.nll(mask)
        kept = [index for index in range(memory.facts.num_blocks) if index not in mask]
        found = dict(zip(kept, tally.nll_many([mask | BlockMask.of(i) for i in kept]), strict=True))
        prices = {i: price_per_byte(found[i] - nll, min(int(freed[i]), over)) for i in kept}
        mask |= BlockMask.of(min(kept, key=prices.__getitem__))
    return mask
