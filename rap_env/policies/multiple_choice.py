"""The multiple-choice knapsack problem, solved exactly: one option of each set, least total cost.

The linear relaxation gives a price per byte. Under that price nearly every option is so much
worse than the best one of its set that no optimal solution has it; a dynamic programme over
whole bytes decides between the few that are left (Pisinger 1995 expands such a core in a
similar way).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_NO_OPTION = 2**50
"""Bytes of the entries that pad sets to the same number of options."""
_ROUNDING = 1e-10
"""Relative error of sums of costs."""


class MultipleChoice:
    """M sets of options with bytes and costs.

    Args:
        sizes: Bytes of the options of each set, whole numbers.
        costs: Their costs, finite and at least 0.

    Attributes:
        least: Position of the smallest option of each set; of equals the cheapest, (M,).
        least_bytes: Their sum.
    """

    def __init__(self, sizes: Sequence[Sequence[int]], costs: Sequence[Sequence[float]]) -> None:
        sets, width = len(sizes), max(map(len, sizes))
        self._sizes: Ints = np.full((sets, width), _NO_OPTION, dtype=np.int64)
        self._costs: Floats = np.full((sets, width), np.inf)
        hulls = []
        for row, (options, prices) in enumerate(zip(sizes, costs, strict=True)):
            self._sizes[row, : len(options)] = options
            self._costs[row, : len(options)] = prices
            hulls.append(_hull(options, prices))
        self._rows = np.arange(sets)
        self._first: Ints = np.array([hull[0] for hull in hulls])  # the cheapest options
        self.least: Ints = np.array([hull[-1] for hull in hulls])
        self.least_bytes = int(self._sizes[self._rows, self.least].sum())
        steps = [(row, *step) for row, hull in enumerate(hulls) for step in pairwise(hull)]
        moves: Ints = np.array(steps, dtype=np.int64).reshape(-1, 3)
        rows, before, after = moves.T
        saved = self._sizes[rows, before] - self._sizes[rows, after]
        slopes = (self._costs[rows, after] - self._costs[rows, before]) / np.maximum(saved, 1)
        order = np.argsort(slopes, kind="stable")  # within a set they ascend already
        self._step_rows, self._step_to = rows[order], after[order]
        self._slopes, self._saved = slopes[order], np.cumsum(saved[order])

    def solve(self, budget: int) -> Ints | None:
        """Positions of the chosen options, (M,), or None if even the smallest do not fit."""
        if self.least_bytes > budget:
            return None
        chosen, rows = self._first.copy(), self._rows
        needed = int(self._sizes[rows, chosen].sum()) - budget
        if needed <= 0:
            return chosen
        last = int(np.searchsorted(self._saved, needed))  # the step that makes it fit
        chosen[self._step_rows[:last]] = self._step_to[:last]
        price = float(self._slopes[last])
        chosen = self._rounded(chosen, int(last), budget)
        return self._improved(chosen, price, budget)

    def cost(self, chosen: Ints) -> float:
        """Total cost of a choice."""
        return float(self._costs[self._rows, chosen].sum())

    def _rounded(self, chosen: Ints, last: int, budget: int) -> Ints:
        """A good choice that fits, from the greedy one before the last step."""
        rows = self._rows
        chosen = chosen.copy()
        size, price = self._sizes[rows, chosen], self._costs[rows, chosen]
        needed = int(size.sum()) - budget
        rise = self._costs - price[:, None]
        rise[size[:, None] - self._sizes < needed] = np.inf
        row, column = np.unravel_index(int(np.argmin(rise)), rise.shape)
        if np.isfinite(rise[row, column]):  # the one change that costs least and makes it fit
            chosen[row] = column
        else:
            chosen[self._step_rows[last]] = self._step_to[last]
        while True:  # spend what is left on single better options
            size, price = self._sizes[rows, chosen], self._costs[rows, chosen]
            left = budget - int(size.sum())
            gain = price[:, None] - self._costs
            gain[self._sizes - size[:, None] > left] = 0
            row, column = np.unravel_index(int(np.argmax(gain)), gain.shape)
            if gain[row, column] <= 0:
                return chosen
            chosen[row] = column

    def _improved(self, chosen: Ints, price: float, budget: int) -> Ints:
        """The optimal choice, given one that fits and the price of a byte."""
        priced = self._costs + price * self._sizes
        least = priced.min(axis=1)
        excess = priced - least[:, None]  # what an option adds to the lower bound
        best = self.cost(chosen)
        rounding = _ROUNDING * max(1.0, best)
        gap = best - (float(least.sum()) - price * budget) + rounding
        possible = excess < gap
        counts = possible.sum(axis=1)
        open_rows = np.flatnonzero(counts > 1)
        fixed = excess.argmin(axis=1)
        if not len(open_rows):
            return fixed if self._better(fixed, chosen, budget, rounding) else chosen
        # The sets with the most expensive second choice first: few states survive them.
        second = np.where(possible, excess, -np.inf)[open_rows].max(axis=1)
        open_rows = open_rows[np.argsort(-second, kind="stable")]
        closed = np.delete(self._rows, open_rows)
        room = budget - int(self._sizes[closed, fixed[closed]].sum())
        smallest = np.where(possible, self._sizes, _NO_OPTION).min(axis=1)[open_rows]
        rest = np.append(np.cumsum(smallest[::-1])[::-1], 0)  # the least that later sets need
        sizes: Ints = np.zeros(1, dtype=np.int64)
        excesses: Floats = np.zeros(1)
        trail: list[tuple[Ints, Ints]] = []
        for step, row in enumerate(open_rows):
            options = np.flatnonzero(possible[row])
            new_sizes = (sizes[:, None] + self._sizes[row, options]).ravel()
            new_excesses = (excesses[:, None] + excess[row, options]).ravel()
            kept = np.flatnonzero((new_excesses < gap) & (new_sizes + rest[step + 1] <= room))
            kept = kept[_pareto(new_sizes[kept], new_excesses[kept] - price * new_sizes[kept])]
            sizes, excesses = new_sizes[kept], new_excesses[kept]
            trail.append((kept // len(options), options[kept % len(options)]))
            if not len(kept):
                return chosen  # nothing is better
        better, state = fixed.copy(), int(np.argmin(excesses - price * sizes))
        for row, (parents, options) in zip(open_rows[::-1], reversed(trail), strict=True):
            better[row] = options[state]
            state = int(parents[state])
        return better if self._better(better, chosen, budget, rounding) else chosen

    def _better(self, better: Ints, chosen: Ints, budget: int, rounding: float) -> bool:
        fits = int(self._sizes[self._rows, better].sum()) <= budget
        return fits and self.cost(better) < self.cost(chosen) - rounding / 10


def _pareto(sizes: Ints, costs: Floats) -> Ints:
    """Positions of the states that no other one dominates in bytes and cost."""
    order = np.lexsort((costs, sizes))
    sorted_costs = costs[order]
    before = np.minimum.accumulate(np.concatenate([[np.inf], sorted_costs[:-1]]))
    kept: Ints = order[sorted_costs < before]
    return kept


def _hull(sizes: Sequence[int], costs: Sequence[float]) -> list[int]:
    """Positions on the lower convex hull, from the cheapest option to the smallest one."""
    order = sorted(range(len(sizes)), key=lambda i: (costs[i], sizes[i]))
    hull: list[int] = []
    for i in order:
        if hull and sizes[i] >= sizes[hull[-1]]:
            continue  # dominated
        while len(hull) > 1 and _slope(hull[-1], i, sizes, costs) <= _slope(
            hull[-2], hull[-1], sizes, costs
        ):
            hull.pop()
        hull.append(i)
    return hull


def _slope(before: int, after: int, sizes: Sequence[int], costs: Sequence[float]) -> float:
    return (costs[after] - costs[before]) / (sizes[before] - sizes[after])
