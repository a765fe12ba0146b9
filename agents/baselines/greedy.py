"""Greedy per byte: importance measured again after each removal."""

from __future__ import annotations

from agents.baselines.base import Baseline, fits
from rap_env.blocks import BlockMask
from rap_env.workload import Request


class GreedyPerByteBaseline(Baseline):
    """Removes, again and again, the block whose loss rise is least per byte that it frees.

    Bytes beyond what the request still needs count for nothing, so of several blocks that
    each suffice alone the one with the least loss goes last, however large another is. Every
    removal is followed by a scan of all kept blocks: for N blocks and k removals about
    ``k * N`` evaluations for each request.
    """

    name = "greedy_per_byte"

    def _choose(self, request: Request) -> tuple[BlockMask, int]:
        freed = self.memory.freed_bytes(request)
        mask, nll, evaluations = BlockMask(), 0.0, 0
        while not fits(self.memory, mask, request):
            if not mask:
                nll, evaluations = self.scorer.dense_nll, 1
            over = self.memory.peak_bytes(mask, request) - request.budget_bytes
            found = self.scorer.scan(mask)
            evaluations += len(found)
            best = min(
                found,
                key=lambda block: _price(found[block] - nll, min(int(freed[block.index]), over)),
            )
            mask, nll = mask | BlockMask.of(best), found[best]
        return mask, evaluations


def _price(loss_rise: float, useful_bytes: int) -> float:
    """Nats per useful byte; a removal that lowers the loss is better the more it lowers it."""
    return loss_rise / max(useful_bytes, 1) if loss_rise > 0 else loss_rise
