"""The knapsack: the plan with the least predicted rise in NLL that fits the request.

It is a multiple-choice knapsack problem, solved exactly: one option of each set, least total
cost. The linear relaxation gives a price per byte. Under that price nearly every option is so
much worse than the best one of its set that no optimal solution has it; a dynamic programme over
whole bytes decides between the few that are left (Pisinger 1995 expands such a core in a similar
way).
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rap_env.context.base import costs_of
from rap_env.errors import ArtifactError
from rap_env.importance.level_costs import LevelCosts, is_as_exact
from rap_env.ladder.items import Item, Ladder, Sharers
from rap_env.ladder.ladder_bytes import LadderBytes
from rap_env.ladder.state import LadderCosts
from rap_env.levels import WEIGHT_LEVELS
from rap_env.memory import MemoryModel, ModelFacts
from rap_env.plan import Plan, block_name, cache_name, is_cache
from rap_env.policies.base import Policy
from rap_env.policies.method import Basis
from rap_env.policies.packaged_files import model_costs
from rap_env.policies.registry import makes, reads
from rap_env.request import Request

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_NO_OPTION = 2**50
"""Bytes of the entries that pad sets to the same number of options."""
_ROUNDING = 1e-10
"""Relative error of sums of costs."""
_CACHED_CHOICES = 1024
_CACHED_SHAPES = 16  # of 85 kB each; a new one takes 5 ms
_STEP_COST = 1e-7
"""Nats per token that each lowered level costs at least, so that ties prefer less
lowering."""


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


@dataclass(frozen=True)
class _Option:
    """What one choice set may choose.

    Attributes:
        levels: The lowered items with their levels; empty is native.
        size: Bytes of the set's weights and cache.
        cost: Predicted rise in NLL, nats per token.
        sharers: Whether it has some of each of the items that decide which bytes sets share.
    """

    levels: tuple[tuple[str, str], ...]
    size: int
    cost: float
    sharers: Sharers


@dataclass(frozen=True)
class _Problem:
    """The choice sets under one assumption of what they share.

    Attributes:
        shared_bytes: Bytes beside the sets.
        options: The options of each set.
    """

    shared_bytes: int
    options: tuple[tuple[_Option, ...], ...]
    solver: MultipleChoice

    def plan(self, chosen: Iterable[int]) -> Plan:
        """The plan of the chosen options, by their positions."""
        picked = (options[i] for options, i in zip(self.options, chosen, strict=True))
        return Plan.of(dict(itertools.chain(*(option.levels for option in picked))))


class KnapsackPolicy(Policy):
    """Chooses the plan of the least predicted rise in NLL whose exact bytes fit the request.

    An attention block and
    its cache are one choice, since the removal of the block removes both. The optimum is
    exact; only the sum of costs is an approximation. If nothing fits, the smallest plan is
    chosen, with blocks removed in `order`. Threads may share a policy.

    Args:
        memory: The model's byte arithmetic.
        costs: Costs of its levels; levels that were not measured are not chosen.
        levels: Levels that may be chosen, by item; items that are not named stay native. None
            allows all that were measured.

    Attributes:
        order: Blocks in the order of what their removal costs, (2L,); empty if that was not
            measured for all of them.

    Raises:
        ArtifactError: The costs are of a model with another number of layers.
    """

    name = "knapsack"
    level_costs: LevelCosts
    order: tuple[int, ...]

    def __init__(
        self,
        memory: MemoryModel,
        costs: LevelCosts,
        levels: Mapping[str, Collection[str]] | None = None,
    ) -> None:
        if costs.num_layers != memory.facts.num_layers:
            raise ArtifactError(
                f"The level costs are of a model with {costs.num_layers} layers, but "
                f"{memory.facts.name} has {memory.facts.num_layers}; profile this model."
            )
        self.memory = memory
        self.level_costs = costs
        self.setup_evaluations = costs.evaluations
        self._levels = levels
        self._bytes = LadderBytes(memory, _ladder(memory.facts, costs))
        self.weight_levels = self._bytes.ladder.weight_levels
        self.order = self._removal_order()
        self._problems_of = lru_cache(maxsize=_CACHED_SHAPES)(self._make_problems)
        self._cached_choice = lru_cache(maxsize=_CACHED_CHOICES)(self._choose)

    def choose(self, request: Request) -> Plan:
        """Return the best plan that fits, or the smallest one if none does."""
        return self._cached_choice(request)

    def delta_nll(self, plan: Plan, seq_len_tokens: int | None = None) -> float:
        """Predicted rise in NLL of a plan, nats per token; see `LevelCosts.delta_nll`."""
        return self.level_costs.delta_nll(plan, seq_len_tokens)

    def _removal_order(self) -> tuple[int, ...]:
        names = [block_name(index) for index in range(self.memory.facts.num_blocks)]
        if not all(self._measured(name, "removed") for name in names):
            return ()
        costs = [self.level_costs.cost(name, "removed") for name in names]
        return tuple(sorted(range(len(names)), key=costs.__getitem__))

    def _choose(self, request: Request) -> Plan:
        costs = self._bytes.costs(request.batch_size, request.seq_len_tokens)
        if costs.native_peak_bytes <= request.budget_bytes:
            return Plan()
        problems = self._problems_of(request.batch_size, request.seq_len_tokens)
        plans = [
            (problem.solver.cost(chosen), problem.plan(chosen))
            for problem in problems
            if (chosen := problem.solver.solve(request.budget_bytes - problem.shared_bytes))
            is not None
        ]
        if plans:
            return min(plans, key=lambda pair: pair[0])[1]
        smallest = min(problems, key=lambda p: p.shared_bytes + p.solver.least_bytes)
        least = smallest.plan(smallest.solver.least)
        smaller = itertools.accumulate(self.order, Plan.without, initial=least)
        return self.memory.first_that_fits(smaller, request)

    def _make_problems(self, batch_size: int, seq_len_tokens: int) -> tuple[_Problem, ...]:
        """One problem for each set of sharers that plans may have, most permissive first.

        A set to which others can be added for no more bytes is left out, since it has fewer
        options.
        """
        costs = self._bytes.costs(batch_size, seq_len_tokens)
        options = self._options(costs, seq_len_tokens)
        # Below 0 by a removal.
        cheapest = [min(option.cost for option in row) for row in options]
        subsets = _subsets(_union(*(option.sharers for row in options for option in row)))
        problems = []
        for allowed in subsets:
            shared = costs.shared.of(allowed)
            larger = [other for other in subsets if other != allowed and _within(allowed, other)]
            if any(costs.shared.of(other) <= shared for other in larger):
                continue
            rows = [tuple(o for o in row if _within(o.sharers, allowed)) for row in options]
            if not all(rows):
                continue  # an FFN block cannot be removed, since that was not measured
            solver = MultipleChoice(
                [[option.size for option in row] for row in rows],
                [[o.cost - least for o in row] for row, least in zip(rows, cheapest, strict=True)],
            )
            problems.append(_Problem(costs.constant_bytes + shared, tuple(rows), solver))
        return tuple(problems)

    def _options(self, costs: LadderCosts, seq_len_tokens: int) -> list[tuple[_Option, ...]]:
        """The options of each block, and those of the embeddings if they have levels."""
        ladder, rows = costs.ladder, []
        option = partial(self._option, costs, seq_len_tokens)
        for number, item in enumerate(ladder.items):
            if item.kind == "cache":
                continue  # chosen with its block
            row, cache = [], ladder.counterparts[number]
            kept = self._cache_positions(costs, cache) if cache != number else []
            for position, level in enumerate(item.levels):
                if position and not self._offered(item.name, level):
                    continue
                if cache == number:
                    row.append(option({number: position}))
                elif level == "removed":
                    row.append(option({number: position, cache: ladder.removed_cache}))
                else:
                    row += [
                        option({number: position, cache: cache_position}) for cache_position in kept
                    ]
            rows.append(tuple(row))
        return rows

    def _cache_positions(self, costs: LadderCosts, cache: int) -> list[int]:
        """Positions of the levels of a cache that may be chosen.

        A level is left out if it needs no fewer bytes than a more exact one, such as a window
        that is longer than the sequence.
        """
        item, sizes = costs.ladder.items[cache], costs.sizes[cache]
        positions = [p for p, n in enumerate(item.levels) if p == 0 or self._offered(item.name, n)]
        return [
            position
            for position in positions
            if not any(
                other != position
                and sizes[other] <= sizes[position]
                and is_as_exact(item.name, item.levels[other], item.levels[position])
                for other in positions
            )
        ]

    def _offered(self, item: str, level: str) -> bool:
        allowed = self._levels is None or level in self._levels.get(item, ())
        return allowed and self._measured(item, level)

    def _measured(self, item: str, level: str) -> bool:
        return level in self.level_costs.costs.get(item, {})

    def _option(
        self, costs: LadderCosts, seq_len_tokens: int, positions: Mapping[int, int]
    ) -> _Option:
        """The option in which some items, by number, are at some positions of their levels."""
        items, ladder = costs.ladder.items, costs.ladder
        sharers = _union(*(ladder.sharers[number][p] for number, p in positions.items()))
        lowered = tuple(
            (items[number].name, items[number].levels[position])
            for number, position in positions.items()
            if 0 < position < len(items[number].levels)  # not removed with its block
        )
        size = sum(costs.sizes[number][position] for number, position in positions.items())
        cost = sum(self.level_costs.cost(item, level, seq_len_tokens) for item, level in lowered)
        return _Option(lowered, size, cost + _STEP_COST * len(lowered), sharers)


def _union(*each: Sharers) -> Sharers:
    return Sharers(*map(max, zip(*each, strict=True)))


def _within(sharers: Sharers, allowed: Sharers) -> bool:
    return all(number <= most for number, most in zip(sharers, allowed, strict=True))


def _subsets(used: Sharers) -> list[Sharers]:
    """Which of the sharers in use a plan may have, as 0 or 1, the most permissive first."""
    choices = [(1, 0) if number else (0,) for number in reversed(used)]
    return [Sharers(*reversed(chosen)) for chosen in itertools.product(*choices)]


def _ladder(facts: ModelFacts, costs: LevelCosts) -> Ladder:
    """The items of a model with the levels that were measured; those of caches in any order."""
    levels_of = costs.costs.items()
    measured = {"removed"}.union(*(levels for item, levels in levels_of if not is_cache(item)))
    weights = [level for level in WEIGHT_LEVELS[1:] if level in measured]
    *blocks, last = Ladder.of(facts, {"weights": weights, "embeddings": weights[:-1]}).items
    levels = tuple(level.name for level in costs.cache_levels)
    layers = range(facts.num_layers if facts.kv_heads and len(levels) > 1 else 0)
    caches = (Item(cache_name(layer), "cache", layer, levels) for layer in layers)
    if last.layer is None:
        return Ladder((*blocks, *caches, last))
    return Ladder((*blocks, last, *caches))


@makes("knapsack")
def knapsack(memory: MemoryModel, basis: Basis | None) -> KnapsackPolicy:
    """On the costs of the context, with the levels of its ladder; or on those in the package."""
    if basis is None:
        return KnapsackPolicy(memory, model_costs(memory))
    ladder = basis.ladder_bytes.ladder
    levels = {item.name: item.levels for item in ladder.items}
    return KnapsackPolicy(memory, costs_of(basis.context, ladder), levels)


@reads(LevelCosts.KIND)
def _read_knapsack(path: Path, memory: MemoryModel) -> Policy:
    return KnapsackPolicy(memory, LevelCosts.load(path, memory))
