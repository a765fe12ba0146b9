"""A policy over levels: the plan with the least predicted rise in NLL that fits the request."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from rap_env.blocks import block_name
from rap_env.errors import ArtifactError
from rap_env.importance.level_costs import LevelCosts, is_as_exact
from rap_env.levels import NATIVE_CACHE, CacheLevel
from rap_env.memory import MemoryModel
from rap_env.plan import EMBEDDINGS, Plan, cache_name, is_cache
from rap_env.policies.base import Policy
from rap_env.policies.multiple_choice import MultipleChoice
from rap_env.request import Request

_CACHED_CHOICES = 1024
_CACHED_SHAPES = 16  # of 85 kB each; a new one takes 5 ms
_STEP_COST = 1e-7
"""Nats per token that each lowered level costs at least, so that ties prefer less lowering."""

Levels = tuple[tuple[str, str], ...]
"""Items and levels of one option."""


@dataclass(frozen=True)
class _Option:
    """What one choice set may choose.

    Attributes:
        levels: The lowered items with their levels; empty is native.
        size: Bytes of the set's weights, stubs and cache.
        cost: Predicted rise in NLL, nats per token.
    """

    levels: Levels
    size: int
    cost: float

    def lowers(self, what: str) -> bool:
        """Whether it lowers ``weights`` that are kept, or a ``cache``."""
        named = [(is_cache(item), level) for item, level in self.levels]
        if what == "cache":
            return any(is_cache for is_cache, _ in named)
        return any(not is_cache and level != "removed" for is_cache, level in named)


@dataclass(frozen=True)
class _Problem:
    """The choice sets under one assumption of what the workspace has to serve.

    Attributes:
        workspace: Bytes beside the sets.
        options: The options of each set.
    """

    workspace: int
    options: tuple[tuple[_Option, ...], ...]
    solver: MultipleChoice

    def plan(self, chosen: Iterable[int]) -> Plan:
        """The plan of the chosen options, by their positions."""
        picked = (options[i] for options, i in zip(self.options, chosen, strict=True))
        return Plan.of(dict(itertools.chain(*(option.levels for option in picked))))


class KnapsackPolicy(Policy):
    """Chooses the plan of the least predicted rise in NLL whose exact bytes fit the request.

    Costs are one-shot costs with measured corrections (`LevelCosts`). An attention block and its
    cache are one choice, since the removal of the block removes both. The optimum is exact; only
    the sum of costs is an approximation. If nothing fits, the smallest plan is chosen. Threads may
    share a policy.

    Args:
        memory: The model's byte arithmetic.
        costs: Costs of its levels; levels that were not measured are not chosen.
        cached_choices: Requests whose plan is cached.
        levels: Levels that may be chosen, by item; items that are not named stay native. None
            allows all that were measured.

    Attributes:
        order: Blocks in the order of what their removal costs, (2L,); None if that was not
            measured for all of them.

    Raises:
        ArtifactError: The costs are of a model with another number of layers.
    """

    name = "knapsack"
    lowers = True

    def __init__(
        self,
        memory: MemoryModel,
        costs: LevelCosts,
        cached_choices: int = _CACHED_CHOICES,
        levels: Mapping[str, Collection[str]] | None = None,
    ) -> None:
        if costs.num_layers != memory.facts.num_layers:
            raise ArtifactError(
                f"The level costs are of a model with {costs.num_layers} layers, but "
                f"{memory.facts.name} has {memory.facts.num_layers}; profile this model."
            )
        self.memory = memory
        self.costs = costs
        self._levels = levels
        self.order = self._removal_order()
        self._problems_of = lru_cache(maxsize=_CACHED_SHAPES)(self._make_problems)
        self._cached_choice = lru_cache(maxsize=cached_choices)(self._choose)

    def choose(self, request: Request) -> Plan:
        """Return the best plan that fits, or the smallest one if none does."""
        return self._cached_choice(request)

    def delta_nll(self, plan: Plan, seq_len_tokens: int | None = None) -> float:
        """Predicted rise in NLL of a plan, nats per token; see `LevelCosts.delta_nll`."""
        return self.costs.delta_nll(plan, seq_len_tokens)

    def _removal_order(self) -> tuple[int, ...] | None:
        names = [block_name(index) for index in range(self.memory.facts.num_blocks)]
        if not all(self._measured(name, "removed") for name in names):
            return None
        costs = [self.costs.cost(name, "removed") for name in names]
        return tuple(sorted(range(len(names)), key=costs.__getitem__))

    def _choose(self, request: Request) -> Plan:
        memory, budget = self.memory, request.budget_bytes
        if memory.dense_peak_bytes(request.batch_size, request.seq_len_tokens) <= budget:
            return Plan()
        problems = self._problems_of(request.batch_size, request.seq_len_tokens)
        found = [
            (problem.solver.cost(chosen), problem.plan(chosen))
            for problem in problems
            if (chosen := problem.solver.solve(budget - problem.workspace)) is not None
        ]
        if found:
            return min(found, key=lambda pair: pair[0])[1]
        smallest = min(problems, key=lambda p: p.workspace + p.solver.least_bytes)
        return smallest.plan(smallest.solver.least)

    def _make_problems(self, batch_size: int, seq_len_tokens: int) -> tuple[_Problem, ...]:
        """One problem for each workspace that plans may need, most permissive first.

        The workspace depends on whether any FFN block is kept and whether anything is lowered.
        Flags that make no difference are not told apart.
        """
        request = Request(batch_size, seq_len_tokens, budget_bytes=1)
        options = self._options(request)
        workspaces: dict[tuple[bool, bool, bool], int] = {}
        for ffn, weights, caches in itertools.product((True, False), repeat=3):
            plan = _example(options, self.memory.facts.num_blocks, ffn, weights, caches)
            workspaces[ffn, weights, caches] = self.memory.breakdown(plan, request).workspace
        problems = []
        for (ffn, weights, caches), size in workspaces.items():
            wider = [(True, weights, caches), (ffn, True, caches), (ffn, weights, True)]
            same = [flags for flags in wider if flags != (ffn, weights, caches)]
            if any(workspaces[flags] <= size for flags in same):
                continue  # a problem with more options needs no more bytes
            allowed = [
                tuple(
                    option
                    for option in row
                    if (weights or not option.lowers("weights"))
                    and (caches or not option.lowers("cache"))
                    and (ffn or not _is_kept_ffn(index, option, self.memory.facts.num_blocks))
                )
                for index, row in enumerate(options)
            ]
            if not all(allowed):
                continue  # an FFN block cannot be removed, since that was not measured
            solver = MultipleChoice(
                [[option.size for option in row] for row in allowed],
                [[option.cost for option in row] for row in allowed],
            )
            problems.append(_Problem(size, tuple(allowed), solver))
        return tuple(problems)

    def _options(self, request: Request) -> list[tuple[_Option, ...]]:
        """The options of each block, and last those of the embeddings; (2L + 1,)."""
        facts, batch, length = self.memory.facts, request.batch_size, request.seq_len_tokens
        rows = []
        for index in range(facts.num_blocks):
            name, sizes = block_name(index), facts.weight_levels(index)
            caches: list[tuple[CacheLevel, int]] = [(NATIVE_CACHE, 0)]
            if index % 2 == 0:
                caches = self._offered_caches(index // 2, batch, length)
            rows.append(
                tuple(
                    self._option(
                        {name: weights, cache_name(index // 2): level.name}, size + held, length
                    )
                    for weights, size in sizes.items()
                    if weights == "native" or self._offered(name, weights)
                    for level, held in (caches if weights != "removed" else [(NATIVE_CACHE, 0)])
                )
            )
        rows.append(
            tuple(
                self._option({EMBEDDINGS: level}, size, length)
                for level, size in facts.embedding_levels.items()
                if level == "native" or self._offered(EMBEDDINGS, level)
            )
        )
        return rows

    def _offered_caches(self, layer: int, batch: int, length: int) -> list[tuple[CacheLevel, int]]:
        """Measured levels of a layer's cache with their bytes.

        A level is left out if it needs no fewer bytes than a more exact one, such as a window that
        is longer than the sequence.
        """
        if not self.memory.facts.kv_heads:
            native = self.memory.cache_bytes(NATIVE_CACHE, layer, batch, length)
            return [(NATIVE_CACHE, native)]
        name = cache_name(layer)
        sizes = {
            level: self.memory.cache_bytes(level, layer, batch, length)
            for level in self.costs.cache_levels
            if level.native or self._offered(name, level.name)
        }
        return [
            (level, size)
            for level, size in sizes.items()
            if not any(
                other != level and held <= size and is_as_exact(name, other.name, level.name)
                for other, held in sizes.items()
            )
        ]

    def _offered(self, item: str, level: str) -> bool:
        allowed = self._levels is None or level in self._levels.get(item, ())
        return allowed and self._measured(item, level)

    def _measured(self, item: str, level: str) -> bool:
        return level in self.costs.one_shot.get(item, {})

    def _option(self, levels: dict[str, str], size: int, seq_len_tokens: int) -> _Option:
        lowered = tuple((item, level) for item, level in levels.items() if level != "native")
        cost = sum(self.costs.cost(item, level, seq_len_tokens) for item, level in lowered)
        return _Option(lowered, size, cost + _STEP_COST * len(lowered))


def _is_kept_ffn(index: int, option: _Option, num_blocks: int) -> bool:
    removed = any(level == "removed" for _, level in option.levels)
    return index < num_blocks and index % 2 == 1 and not removed


def _example(
    options: list[tuple[_Option, ...]], num_blocks: int, ffn: bool, weights: bool, caches: bool
) -> Plan:
    """A plan that keeps an FFN block, lowers weights and lowers caches as the flags say.

    A flag is ignored if no option of the model does what it says.
    """
    levels: dict[str, str] = {}
    for what, wanted in (("weights", weights), ("cache", caches)):
        found = (
            option
            for index, row in enumerate(options)
            for option in row
            if option.lowers(what) and (ffn or index % 2 == 0)
        )
        if wanted and (option := next(found, None)) is not None:
            levels |= dict(option.levels)
    plan = Plan.of(levels)
    return plan if ffn else plan.without(*range(1, num_blocks, 2))
