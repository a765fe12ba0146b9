"""Uniform settings, as llama.cpp has them: one level for all weights, one for all caches."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass

from rap_env.importance.orders import LadderOrder, greedy_order
from rap_env.ladder.ladder_bytes import mask_bytes
from rap_env.levels import WEIGHT_LEVELS
from rap_env.memory import ModelFacts
from rap_env.plan import EMBEDDINGS, Plan
from rap_env.policies.method import Basis, CountingScorer, Method
from rap_env.policies.registry import register
from rap_env.request import Request

_LEAST_SHARE = 2 / 3  # of the sum of what the parts of a setting lose alone

_KINDS = {"attn": "weights", "ffn": "weights", "cache": "caches", "embeddings": "embeddings"}


def uniform_plans(facts: ModelFacts) -> list[Plan]:
    """Uniform plans of a model from native down: caches first, since they cost least, then weights.

    Levels that some block does not have are left native there.
    """
    plans = [Plan()]
    if facts.kv_heads:
        plans += [Plan.uniform(facts.num_layers, caches=level) for level in ("int8", "int4")]
    for level in WEIGHT_LEVELS[1:-1]:
        names = facts.blocks_at(level)
        if "int8" in facts.embedding_levels:
            names[EMBEDDINGS] = "int8"
        if (lowered := plans[-1].lower(names)) != plans[-1]:
            plans.append(lowered)
    return plans


def middle_first(num_layers: int) -> list[int]:
    """An order of removal without measurements: from the layer before the last one to the first.

    The last layer and the first two matter most in most models (Men et al. 2024, ShortGPT),
    so they come last.
    """
    ends = [layer for layer in (num_layers - 1, 1, 0) if 0 <= layer < num_layers]
    middle = [layer for layer in reversed(range(num_layers)) if layer not in ends]
    layers = [*middle, *dict.fromkeys(ends)]
    return [index for layer in layers for index in (2 * layer, 2 * layer + 1)]


@dataclass(frozen=True)
class UniformSetting:
    """A uniform plan, with whole blocks removed.

    Attributes:
        places: Places of its levels of weights, caches and embeddings among those of the
            ladder (0 is native), and the number of removed blocks.
        rises: What its level of weights, that of caches, that of embeddings and its removed
            blocks lose alone: ΔNLL, nats per token.
    """

    plan: Plan
    places: tuple[int, ...]
    rises: tuple[float, ...]

    def dominates(self, other: UniformSetting) -> bool:
        """Whether no level is below the other's and no more blocks are removed."""
        pairs = zip(self.places, other.places, strict=True)
        return self != other and all(own <= theirs for own, theirs in pairs)


@register
class Uniform(Method):
    """Chooses one level each for all weights, all caches and embeddings, then removes blocks.

    Blocks are removed in the GSI order over blocks. Of all settings that fit, it chooses the
    one with the least NLL on the calibration text. Each combination of levels is tried with
    the fewest removed blocks that fit. Settings that are hardly the best are not measured:
    those that are nowhere above another one that fits, and those of which one part (removed
    blocks, the level of one kind of items) alone, or two thirds of the sum of all, lose more
    than the best measured one.
    """

    name = "uniform"

    def __init__(self, basis: Basis) -> None:
        super().__init__(basis)
        removals = mask_bytes(self.memory)
        profile = self.context.item_gsi(removals)
        self.setup_evaluations = profile.evaluations
        self._native_nll = profile.dense_nll
        self._order, self._rises = self._removal_order(
            greedy_order(self.context.level_costs(removals.ladder), removals, profile)
        )
        self._kept = self._kept_settings()

    def settings(self, request: Request) -> list[UniformSetting]:
        """The settings that fit and may be the best, those with the least sum of rises first."""
        fitting = [
            setting for kept in self._kept if (setting := self._fitting(kept, request)) is not None
        ]
        best = [s for s in fitting if not any(other.dominates(s) for other in fitting)]
        return sorted(best, key=lambda setting: (sum(setting.rises), setting.places))

    def all_peak_bytes(self, shape: tuple[int, int]) -> list[int]:
        """Distinct peak bytes of every setting for a batch size and length, from large to small."""
        request, counts = Request(*shape, budget_bytes=1), range(len(self._order) + 1)
        settings = itertools.starmap(self._without, itertools.product(self._kept, counts))
        peaks = {self.memory.peak_bytes(setting.plan, request) for setting in settings}
        return sorted(peaks, reverse=True)

    def _choose(self, request: Request, scores: CountingScorer) -> Plan:
        return self.best(request, scores)

    def best(self, request: Request, scores: CountingScorer) -> Plan:
        """The setting with the least NLL of those that fit."""
        settings = self.settings(request)
        if not settings:
            return self.ladder.plan(self.costs(request).steps.lowest)
        best, best_nll = settings[0].plan, float("inf")
        for setting in settings:
            least = max(*setting.rises, _LEAST_SHARE * sum(setting.rises))
            if least >= best_nll - self._native_nll:
                continue
            nll = scores.nll(setting.plan)
            if nll < best_nll:
                best, best_nll = setting.plan, nll
        return best

    def _removal_order(self, order: LadderOrder) -> tuple[list[str], list[float]]:
        """The blocks in the order of removal, and the ΔNLL without the first 0, 1, 2 ... of them.

        Where GSI stopped early, the further blocks count with what each loses alone.
        """
        removable = {item.name for item in self.ladder.items if "removed" in item.levels}
        names, rises = list[str](), [0.0]
        for (item, _), rise in zip(order.steps, itertools.accumulate(order.rises), strict=True):
            if (name := order.ladder.items[item].name) in removable:
                names.append(name)
                rises.append(rise)
        return names, rises

    def _kept_settings(self) -> list[UniformSetting]:
        """Each combination of levels of weights, caches and embeddings, without removed blocks."""
        chains: dict[str, list[str]] = {kind: ["native"] for kind in _KINDS.values()}
        for item in self.ladder.items:
            chain = chains[_KINDS[item.kind]]
            chain += [n for n in item.levels if n != "removed" and n not in chain]
        scores = CountingScorer(self.context.scorer)
        rises = {
            (kind, level): scores.nll(self._uniform({kind: level})) - self._native_nll
            for kind, chain in chains.items()
            for level in chain
        }
        self.setup_evaluations += scores.evaluations
        settings = []
        for levels in itertools.product(*chains.values()):
            by_kind = dict(zip(chains, levels, strict=True))
            places = tuple(chains[kind].index(level) for kind, level in by_kind.items())
            own = tuple(rises[pair] for pair in by_kind.items())
            settings.append(UniformSetting(self._uniform(by_kind), (*places, 0), (*own, 0.0)))
        return settings

    def _uniform(self, by_kind: Mapping[str, str]) -> Plan:
        """The plan in which every item that has the level of its kind is at it."""
        levels = {item: by_kind.get(_KINDS[item.kind], "native") for item in self.ladder.items}
        return Plan.of({item.name: n for item, n in levels.items() if n in item.levels})

    def _fitting(self, kept: UniformSetting, request: Request) -> UniformSetting | None:
        """The setting with the fewest removed blocks that fits; None if there is none."""

        def fits(removed: int) -> bool:
            return self.fits(self._without(kept, removed).plan, request)

        most = len(self._order)
        if not fits(most):
            return None
        return self._without(kept, bisect_left(range(most), True, key=fits))

    def _without(self, kept: UniformSetting, removed: int) -> UniformSetting:
        """A setting with so many blocks removed."""
        return UniformSetting(
            kept.plan.without(*self._order[:removed]),
            (*kept.places[:-1], removed),
            (*kept.rises[:-1], self._rises[removed]),
        )
