"""Evolutionary search: many small changes of the best mask, most of them scored on few windows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Generic

import numpy as np

from agents.baselines.base import (
    Baseline,
    CountingScorer,
    PlanT,
    fits,
    restore_unneeded,
)
from agents.baselines.knapsack import KnapsackBaseline
from agents.baselines.orders import GSIBaseline, OneShotPerByteBaseline
from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.request import Request

if TYPE_CHECKING:
    from rap_env.context.base import PruningContext

_OFFSPRING = 32
_SURVIVORS = (8, 2)  # masks that pass each stage on a part of the text
_FIRST_PARTS = 8  # parts into which the text is cut for the first stage, fewer if it is short
_OFFSPRING_OF_ONE_WINDOW = 4  # for a text of one window, where every mask costs a whole pass
MOST_SWITCHES = 3
"""Most switches of one mutation."""
_TRIES = 20  # proposals per offspring before the search counts as converged


class EvolutionaryBaseline(Baseline):
    """(1 + lambda) evolution of a mask at equal bytes (EvoPress, Sieberling et al. 2024).

    arXiv 2410.14649, Algorithm 1: offspring are the parent after a few level switches, here
    removed blocks that are restored and others that are removed until the request fits again;
    no block stays removed that need not be. Selection has stages: all offspring are scored on a
    small part of the text, the best of them on a larger part, the last two on all of it, where
    the better one becomes the parent if it beats the parent. Deviations: the parts of the text
    rotate instead of being drawn, the first parent is the best of three cheap masks instead of
    a random one, a mask scored on the whole text is never tried again, and the search stops
    early once the neighbourhood of the parent is exhausted.

    Args:
        context: Memory model, scorer and importance.
        seed: Seed of the mutations; they depend on the request too.
        max_evaluations: Upper limit of passes over the whole text per request, at least 1; a
            part of the text counts as that part.
    """

    name = "evolutionary"
    seeded = True

    def __init__(self, context: PruningContext, seed: int = 0, max_evaluations: int = 500) -> None:
        super().__init__(context, seed)
        starts = (GSIBaseline, KnapsackBaseline, OneShotPerByteBaseline)
        self._starts: list[Baseline] = [start(context) for start in starts]
        self._last = np.argsort(-np.asarray(context.one_shot.delta_nll), kind="stable").tolist()
        self.max_evaluations = max_evaluations
        # Of the orders that the first parents follow; GSI's first round measures one-shot too.
        self.setup_evaluations = max(start.setup_evaluations for start in self._starts)

    def _choose(self, request: Request, scores: CountingScorer) -> Plan:
        if fits(self.memory, Plan(), request):
            return Plan()
        mutate = partial(mutated, self.memory, request)
        search: Evolution[Plan] = Evolution(
            Plan(), mutate, scores, request, self.seed, self.max_evaluations
        )
        search.begin(self._start_masks(request))
        while search.step():
            pass
        return search.parent

    def _start_masks(self, request: Request) -> list[Plan]:
        """Cheap masks under which the request fits, with and without unneeded removals."""
        masks = [start.choose(request) for start in self._starts]
        masks += [restore_unneeded(self.memory, m, self._last, request) for m in masks]
        return list(dict.fromkeys(masks))


@dataclass(frozen=True)
class _Stage:
    """Windows of the text on which masks are scored, and how many masks pass."""

    windows: tuple[int, ...]
    survivors: int


class Evolution(Generic[PlanT]):
    """The search for one request, over masks or over plans.

    Args:
        nothing: The mask or plan that changes nothing.
        mutate: Returns a mask or plan near another one under which the request fits, or None.
        scores: Scores masks or plans.
        request: The request.
        seed: Seed of the mutations, together with the request.
        max_evaluations: Upper limit of passes over the whole text.

    Attributes:
        parent: The best mask or plan so far.
        nll: Its NLL on the whole text, nats per token.
    """

    def __init__(
        self,
        nothing: PlanT,
        mutate: Callable[[PlanT, np.random.Generator], PlanT | None],
        scores: CountingScorer,
        request: Request,
        seed: int,
        max_evaluations: int,
    ) -> None:
        self._mutate: Callable[[PlanT, np.random.Generator], PlanT | None] = mutate
        self._scores = scores
        key = [seed, request.batch_size, request.seq_len_tokens, request.budget_bytes]
        self._rng = np.random.default_rng(key)
        self._total = scores.num_windows
        self._windows_left = max_evaluations * self._total
        self._generation = 0
        self._scored: set[PlanT] = set()
        self._tried: set[PlanT] = set()  # since the current parent was found
        self.parent: PlanT = nothing
        self.nll = float("inf")

    def begin(self, masks: list[PlanT]) -> None:
        """Take the best of some under which the request fits as the first parent."""
        self._select(masks[: self._windows_left // self._total])

    def step(self) -> bool:
        """Run one generation; False if no mask is left to try or no evaluation to spend."""
        stages = self._stages()
        most = self._affordable(stages)
        offspring = list(self._offspring(most)) if most else []
        if not offspring:
            return False
        self._generation += 1
        for stage in stages:
            self._windows_left -= len(offspring) * len(stage.windows)
            nll = dict(zip(offspring, self._scores.nll_on(offspring, stage.windows), strict=True))
            offspring = sorted(offspring, key=nll.__getitem__)[: stage.survivors]
        self._select(offspring)
        return True

    def _select(self, masks: list[PlanT]) -> None:
        """Score masks on the whole text; the best becomes the parent if it beats the parent."""
        self._windows_left -= len(masks) * self._total
        self._scored |= set(masks)
        for nll, mask in zip(self._scores.nll_many(masks), masks, strict=True):
            if nll < self.nll:
                self.parent, self.nll = mask, nll
                self._tried.clear()  # near a new parent, on other windows, a mask may do better

    def _stages(self) -> list[_Stage]:
        """Return the stages on parts of the text; the parts rotate with the generation."""
        first = min(_FIRST_PARTS, self._total)
        parts = [number for number in (first, first // 2) if number > 1]
        return [
            _Stage(tuple(range((self._generation + place) % of, self._total, of)), survivors)
            for place, (of, survivors) in enumerate(zip(parts, _SURVIVORS, strict=False))
        ]

    def _affordable(self, stages: list[_Stage]) -> int:
        """Return how many offspring the next generation may have."""
        most = _OFFSPRING if stages else _OFFSPRING_OF_ONE_WINDOW
        while most and self._cost(stages, most) > self._windows_left:
            most -= 1
        return most

    def _cost(self, stages: list[_Stage], masks: int) -> int:
        """Return the windows that a generation scores."""
        cost = 0
        for stage in stages:
            cost += masks * len(stage.windows)
            masks = min(masks, stage.survivors)
        return cost + masks * self._total

    def _offspring(self, most: int) -> Iterator[PlanT]:
        """Yield up to `most` new masks near the parent; fewer once its neighbours are known."""
        for _ in range(most * _TRIES):
            mask = self._mutate(self.parent, self._rng)
            if mask is not None and mask not in self._scored and mask not in self._tried:
                self._tried.add(mask)
                yield mask
                most -= 1
            if not most:
                return


def mutated(
    memory: MemoryModel, request: Request, parent: Plan, rng: np.random.Generator
) -> Plan | None:
    """Return a mask after a few switches; fewer are likelier, as in EvoPress."""
    switches = int(rng.integers(1, MOST_SWITCHES + 1, size=2).min())
    restored = rng.permutation(sorted(parent.removed))[:switches]
    mask = Plan(parent.removed.difference(restored.tolist()))
    kept = [i for i in range(memory.facts.num_blocks) if i not in parent.removed]
    for index in rng.permutation(kept).tolist():
        if fits(memory, mask, request):
            break
        mask = mask.without(index)
    if not fits(memory, mask, request):
        return None
    order = rng.permutation(sorted(mask.removed)).tolist()
    return restore_unneeded(memory, mask, order, request)
