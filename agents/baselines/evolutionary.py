"""Evolutionary search: many small changes of the best mask, most of them judged briefly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from agents.baselines.base import Baseline, fits, put_back_needless
from agents.baselines.bench import Bench
from agents.baselines.knapsack import KnapsackBaseline
from agents.baselines.orders import GSIBaseline, OneShotPerByteBaseline
from rap_env.blocks import BlockMask
from rap_env.request import Request

_OFFSPRING = 32
_SURVIVORS = (8, 2)  # masks that go on after a stage on a part of the text
_FIRST_PARTS = 8  # parts that a text is cut into for the first stage, fewer if it is short
_OFFSPRING_OF_ONE_WINDOW = 4  # where every mask costs a whole pass
_MOST_SWITCHES = 3
_TRIES = 20  # proposals for each offspring before a search counts as converged


class EvolutionaryBaseline(Baseline):
    """(1 + lambda) evolution of a mask at equal bytes (EvoPress, Sieberling et al. 2024).

    arXiv 2410.14649, Algorithm 1: offspring are the parent after a few level switches, here
    removed blocks put back and others removed until the request fits again; nothing stays
    removed that need not be. They are selected in stages: all on a small part of the text, the
    best of them on a larger one, the last two on all of it, where the better one becomes the
    parent if it beats it. Deviations: the parts of the text take turns and are not drawn, the
    first parent is the best of three cheap masks and not a random one, a mask scored on the
    whole text is never tried again, and the search ends early once the parent's surroundings
    are exhausted.

    Args:
        context: The model's memory, scores and importance.
        seed: Seed of the mutations; they depend on the request too.
        evaluations: Most passes over the whole text for a request; a mask run on a part of it
            counts as that part; at least 1, never exceeded.
    """

    name = "evolutionary"
    seeded = True

    def __init__(self, context: Bench, seed: int = 0, evaluations: int = 500) -> None:
        super().__init__(context, seed)
        self._starts: list[Baseline] = [
            KnapsackBaseline(context),
            OneShotPerByteBaseline(context),
        ]
        if context.gsi is not None:
            self._starts.insert(0, GSIBaseline(context))
        self._last = np.argsort(-np.asarray(context.one_shot.loss_rise), kind="stable").tolist()
        self.evaluations = evaluations

    @property
    def setup_evaluations(self) -> int:
        """What the orders cost that the first parents follow.

        The first round of GSI gives the one-shot importance too.
        """
        return max(start.setup_evaluations for start in self._starts)

    def _choose(self, request: Request) -> tuple[BlockMask, int]:
        if fits(self.memory, BlockMask(), request):
            return BlockMask(), 0
        search = Evolution(self, request, self.evaluations)
        search.begin(self._start_masks(request))
        while search.step():
            pass
        return search.parent, search.evaluations

    def _start_masks(self, request: Request) -> list[BlockMask]:
        """Cheap masks under which the request fits, as they are and without what is needless."""
        masks = [start.select(request).mask for start in self._starts]
        masks += [put_back_needless(self.memory, m, self._last, request) for m in masks]
        return list(dict.fromkeys(masks))


@dataclass(frozen=True)
class _Stage:
    """A part of the text, and how many masks that it saw go on."""

    windows: tuple[int, ...]
    survivors: int


class Evolution:
    """The search for one request.

    Args:
        baseline: Gives memory, scorer and seed.
        request: What has to fit.
        evaluations: Most passes over the whole text.

    Attributes:
        parent: The best mask so far.
        nll: Its NLL on the whole text, nats per token.
    """

    def __init__(self, baseline: Baseline, request: Request, evaluations: int) -> None:
        self._memory, self._scorer = baseline.memory, baseline.scorer
        self._request = request
        key = [baseline.seed, request.batch_size, request.seq_len_tokens, request.budget_bytes]
        self._rng = np.random.default_rng(key)
        self._total = self._scorer.num_windows
        self._most_windows = evaluations * self._total
        self._windows_run = 0
        self._generation = 0
        self._scored: set[BlockMask] = set()
        self._tried: set[BlockMask] = set()  # since the parent was found
        self.parent, self.nll = BlockMask(), np.inf

    @property
    def evaluations(self) -> int:
        """Passes over the whole text that were needed, rounded up; stored scores count too."""
        return -(-self._windows_run // self._total)

    def begin(self, masks: list[BlockMask]) -> None:
        """Choose the first parent, the best of some masks under which the request fits."""
        self._meet(masks[: self._most_windows // self._total])

    def step(self) -> bool:
        """One generation; False where nothing is left to try or to spend."""
        stages = self._stages()
        most = self._affordable(stages)
        offspring = list(self._offspring(most)) if most else []
        if not offspring:
            return False
        self._generation += 1
        for stage in stages:
            self._windows_run += len(offspring) * len(stage.windows)
            nll = dict(zip(offspring, self._scorer.nll_on(offspring, stage.windows), strict=True))
            offspring = sorted(offspring, key=nll.__getitem__)[: stage.survivors]
        self._meet(offspring)
        return True

    def _meet(self, masks: list[BlockMask]) -> None:
        """Score masks on the whole text; the best becomes the parent if it beats it."""
        self._windows_run += len(masks) * self._total
        self._scored |= set(masks)
        for nll, mask in zip(self._scorer.nll_many(masks), masks, strict=True):
            if nll < self.nll:
                self.parent, self.nll = mask, nll
                self._tried.clear()  # elsewhere, and on another part, a mask may do better

    def _stages(self) -> list[_Stage]:
        """Stages on a part of the text; every generation sees other parts."""
        first = min(_FIRST_PARTS, self._total)
        parts = [number for number in (first, first // 2) if number > 1]
        return [
            _Stage(tuple(range((self._generation + place) % of, self._total, of)), survivors)
            for place, (of, survivors) in enumerate(zip(parts, _SURVIVORS, strict=False))
        ]

    def _affordable(self, stages: list[_Stage]) -> int:
        """How many offspring one more generation may have."""
        left = self._most_windows - self._windows_run
        most = _OFFSPRING if stages else _OFFSPRING_OF_ONE_WINDOW
        while most and self._cost(stages, most) > left:
            most -= 1
        return most

    def _cost(self, stages: list[_Stage], masks: int) -> int:
        """Windows that a generation runs."""
        cost = 0
        for stage in stages:
            cost += masks * len(stage.windows)
            masks = min(masks, stage.survivors)
        return cost + masks * self._total

    def _offspring(self, most: int) -> Iterator[BlockMask]:
        """Up to so many new masks near the parent; none once its surroundings are known."""
        for _ in range(most * _TRIES):
            mask = self._mutated()
            if mask is not None and mask not in self._scored and mask not in self._tried:
                self._tried.add(mask)
                yield mask
                most -= 1
            if not most:
                return

    def _mutated(self) -> BlockMask | None:
        """The parent after a few switches; few are likelier, as in EvoPress."""
        rng, parent = self._rng, self.parent
        switches = int(rng.integers(1, _MOST_SWITCHES + 1, size=2).min())
        back = rng.permutation(list(parent))[:switches]
        returned = BlockMask.of(*back.tolist())
        mask = parent - returned
        kept = [i for i in range(self._memory.facts.num_blocks) if i not in parent]
        for index in rng.permutation(kept).tolist():
            if fits(self._memory, mask, self._request):
                break
            mask |= BlockMask.of(index)
        if not fits(self._memory, mask, self._request):
            return None
        order = rng.permutation(list(mask)).tolist()
        return put_back_needless(self._memory, mask, order, self._request)
