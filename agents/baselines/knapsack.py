"""The best set of blocks if losses simply added up."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from agents.baselines.base import fits
from agents.baselines.bench import Bench
from agents.baselines.orders import OneShotBaseline
from rap_env.blocks import BlockMask
from rap_env.request import Request


class KnapsackBaseline(OneShotBaseline):
    """Least sum of one-shot loss rises over all sets that free the needed bytes, exactly.

    Losses do not add up in a real model, so this is the best use of one-shot importance and
    not the best mask.
    """

    name = "knapsack"

    def __init__(self, context: Bench, seed: int = 0) -> None:
        super().__init__(context, seed)
        self._loss_rise = np.asarray(context.one_shot.loss_rise, dtype=np.float64)

    def _choose(self, request: Request) -> tuple[BlockMask, int]:
        if fits(self.memory, BlockMask(), request):
            return BlockMask(), 0
        dense = self.memory.dense_peak_bytes(request.batch_size, request.seq_len_tokens)
        chosen = cheapest_cover(
            self._loss_rise, self.memory.freed_bytes(request), dense - request.budget_bytes
        )
        if chosen is None:  # only the workspace of the last ffn block makes it fit
            return BlockMask.all_of(self.memory.facts.blocks), 0
        return BlockMask.of(*chosen), 0


def cheapest_cover(
    costs: npt.NDArray[np.float64], freed: npt.NDArray[np.int64], needed: int
) -> list[int] | None:
    """The set of items with the least cost that frees at least `needed` bytes.

    Exact, by dynamic programming over the sets that no other beats in both bytes and cost
    (Nemhauser and Ullmann 1969): whole bytes are counted, nothing is rounded. Where items
    come in few sizes the list of such sets stays short.

    Args:
        costs: Cost of each item, shape (N,); an item whose cost is below 0 is always taken.
        freed: Bytes that each item frees, shape (N,).
        needed: Bytes that have to be freed.

    Returns:
        Indices of the items in ascending order; None if all items together free too little.
    """
    free = [int(i) for i in np.flatnonzero(costs < 0)]
    needed = max(0, needed - int(freed[free].sum()))
    items = [int(i) for i in np.flatnonzero(costs >= 0)]
    if int(freed[items].sum()) < needed:
        return None
    total_bytes, total_cost = np.zeros(1, dtype=np.int64), np.zeros(1)
    steps: list[npt.NDArray[np.int64]] = []
    for item in items:
        grown = np.minimum(total_bytes + freed[item], needed)  # more than needed is no better
        all_bytes = np.concatenate([total_bytes, grown])
        all_costs = np.concatenate([total_cost, total_cost + costs[item]])
        kept = _unbeaten(all_bytes, all_costs)
        total_bytes, total_cost = all_bytes[kept], all_costs[kept]
        steps.append(kept)
    position = int(np.argmax(total_bytes))  # the only unbeaten set that frees all that is needed
    for step in range(len(items) - 1, -1, -1):
        before = int(steps[step][position])
        size = _size_before(steps, step)
        if before >= size:
            free.append(items[step])
        position = before % size
    return sorted(free)


def _size_before(steps: list[npt.NDArray[np.int64]], step: int) -> int:
    """How many sets there were before an item was looked at."""
    return len(steps[step - 1]) if step else 1


def _unbeaten(
    total_bytes: npt.NDArray[np.int64], total_cost: npt.NDArray[np.float64]
) -> npt.NDArray[np.int64]:
    """Positions of the sets that no other set beats in both bytes and cost."""
    order = np.lexsort((total_cost, -total_bytes))  # most bytes first, then least cost
    costs = total_cost[order]
    best_so_far = np.minimum.accumulate(np.concatenate([[np.inf], costs[:-1]]))
    return order[costs < best_so_far]
