"""The optimal set of blocks under the assumption that losses add up."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from agents.baselines.base import CountingScorer, fits
from agents.baselines.orders import OneShotBaseline
from rap_env.plan import Plan
from rap_env.request import Request


class KnapsackBaseline(OneShotBaseline):
    """Minimises the sum of one-shot rises in NLL over all sets that free the needed bytes.

    The optimum is exact, but the losses of a real model do not add up: this is the best use of
    one-shot importance, not the best mask.
    """

    name = "knapsack"

    def _choose(self, request: Request, scores: CountingScorer) -> Plan:
        if fits(self.memory, Plan(), request):
            return Plan()
        dense = self.memory.dense_peak_bytes(request.batch_size, request.seq_len_tokens)
        chosen = cheapest_cover(
            self._delta_nll, self.memory.freed_bytes(request), dense - request.budget_bytes
        )
        if chosen is None:  # it fits only with the workspace of the last FFN block freed as well
            return Plan.removing(*self.memory.facts.blocks)
        return Plan.removing(*chosen)


def cheapest_cover(
    costs: npt.NDArray[np.float64], freed: npt.NDArray[np.int64], needed: int
) -> list[int] | None:
    """Return the set of items with the lowest cost that frees at least `needed` bytes.

    Exact dynamic programming over the Pareto-optimal sets in bytes and cost (Nemhauser and
    Ullmann 1969), in whole bytes without rounding. The list of these sets stays short if the
    items have few distinct sizes.

    Args:
        costs: Cost of each item, shape (N,); an item with a negative cost is always chosen.
        freed: Bytes that each item frees, shape (N,).
        needed: Bytes that have to be freed.

    Returns:
        Indices of the items in ascending order; None if all items together free too few bytes.
    """
    free = [int(i) for i in np.flatnonzero(costs < 0)]
    needed = max(0, needed - int(freed[free].sum()))
    items = [int(i) for i in np.flatnonzero(costs >= 0)]
    if int(freed[items].sum()) < needed:
        return None
    total_bytes, total_cost = np.zeros(1, dtype=np.int64), np.zeros(1)
    steps: list[npt.NDArray[np.int64]] = []
    for item in items:
        grown = np.minimum(total_bytes + freed[item], needed)  # more than needed has no value
        all_bytes = np.concatenate([total_bytes, grown])
        all_costs = np.concatenate([total_cost, total_cost + costs[item]])
        kept = _pareto_optimal(all_bytes, all_costs)
        total_bytes, total_cost = all_bytes[kept], all_costs[kept]
        steps.append(kept)
    position = int(np.argmax(total_bytes))  # the only Pareto-optimal set that frees enough
    for step in range(len(items) - 1, -1, -1):
        before = int(steps[step][position])
        size = _size_before(steps, step)
        if before >= size:
            free.append(items[step])
        position = before % size
    return sorted(free)


def _size_before(steps: list[npt.NDArray[np.int64]], step: int) -> int:
    """Number of sets before an item was considered."""
    return len(steps[step - 1]) if step else 1


def _pareto_optimal(
    total_bytes: npt.NDArray[np.int64], total_cost: npt.NDArray[np.float64]
) -> npt.NDArray[np.int64]:
    """Return the positions of the sets that no other set dominates in bytes and cost."""
    order = np.lexsort((total_cost, -total_bytes))  # most bytes first, then least cost
    costs = total_cost[order]
    best_so_far = np.minimum.accumulate(np.concatenate([[np.inf], costs[:-1]]))
    return order[costs < best_so_far]
