"""The knapsack: the plan with the least predicted rise in NLL that fits the request."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

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
from rap_env.policies.multiple_choice import MultipleChoice
from rap_env.policies.packaged_files import model_costs
from rap_env.policies.registry import makes, reads
from rap_env.request import Request

_CACHED_CHOICES = 1024
_CACHED_SHAPES = 16  # of 85 kB each; a new one takes 5 ms
_STEP_COST = 1e-7
"""Nats per token that each lowered level costs at least, so that ties prefer less
lowering."""


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
