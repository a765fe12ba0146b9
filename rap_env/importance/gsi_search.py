"""Greedy sequential importance (GSI): lower the least important item, measure again, repeat.

RAP (arXiv 2505.17138, Algorithm 1) orders the blocks of a model by the rise in NLL at their
removal. Over a ladder with more levels, the order is by the rise per freed byte.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rap_env.errors import ArtifactError, check_name
from rap_env.importance.level_costs import LevelCosts
from rap_env.importance.orders import (
    PricedState,
    cheapest_step,
    check_ladder,
    one_shot_costs,
    reference_costs,
)
from rap_env.importance.profiles import GSI_METHODS, GSIProfile, ScoringMeter
from rap_env.ladder.items import Ladder
from rap_env.ladder.ladder_bytes import LadderBytes, mask_bytes
from rap_env.ladder.state import LadderState
from rap_env.memory import MemoryModel
from rap_env.models.progress import progress_bar
from rap_env.scoring.interface import OnScore, bar_callback
from rap_env.scoring.scorer import PlanScorer

_LAZY_BATCH = 6
_NEIGHBOURS = 2


def gsi(
    scorer: PlanScorer,
    ladder_bytes: LadderBytes | None = None,
    costs: LevelCosts | None = None,
    *,
    method: str = "exact",
    stop: int | None = None,
    path: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> GSIProfile:
    """Find the order in which to lower items so that the NLL rises least in each round.

    Args:
        scorer: Measures plans on the calibration text.
        ladder_bytes: The ladder and its bytes: items are ordered by the rise in NLL per byte
            that is freed at the reference request (`rap_env.importance.orders`), and those
            that free nothing there are left out. None removes blocks, ordered by the rise
            alone.
        costs: One-shot costs of the ladder's levels: what is known of a step that was not
            measured.
        method: ``"exact"`` gives the order of the naive loop. ``"lazy"`` measures only the
            items with the least last known rise again, and more of them if one has risen; it
            is several times faster, and may miss an item that the exact search finds.
        stop: Actions after which to stop; None continues until nothing is left.
        path: File of the artifact. It is written after each action. A profile of the same
            model, text and ladder that already exists there is continued.
        progress: Whether to draw a progress bar.

    Returns:
        The profile, with at least `stop` actions.

    Raises:
        UnknownNameError: An unknown method.
        ArtifactError: The file at `path` is damaged, or of another model, text, method or
            ladder.
    """
    check_name("GSI method", method, GSI_METHODS)
    if ladder_bytes is None or costs is None:
        state = LadderState(reference_costs(mask_bytes(MemoryModel(scorer.llm))))
    else:
        one_shot = one_shot_costs(costs, ladder_bytes.ladder)
        state = PricedState(reference_costs(ladder_bytes), one_shot)
    profile = _start(scorer, state.costs.ladder, method, path)
    with progress_bar(progress, desc="GSI", unit="plan", leave=False) as bar:
        search = _Search(scorer, state, profile, stop, bar_callback(bar))
        while (item := search.next()) is not None:
            profile = search.profile
            if path is not None:
                profile.save(path)
            rise = profile.nll_after[-1] - profile.dense_nll
            bar.set_postfix_str(f"{len(profile.order)} lowered, delta_nll {rise:.3f}")
            state.lower(item)
    return profile


def _start(
    scorer: PlanScorer, ladder: Ladder, method: str, path: str | os.PathLike[str] | None
) -> GSIProfile:
    """An empty profile, or the one saved at `path`."""
    if path is not None and Path(path).exists():
        saved = GSIProfile.load(path, scorer.llm)
        check_ladder(saved, ladder)
        if saved.method != method or saved.provenance["scoring"] != dict(scorer.context):
            raise ArtifactError(
                f"{os.fspath(path)} was measured with method={saved.method!r} on "
                f"{saved.provenance['text']}, not with {method!r} on this text in this way; give "
                "another path or delete it."
            )
        return saved
    meter, native_nll = ScoringMeter(scorer), scorer.native_nll
    return GSIProfile(
        method=method,
        levels={item.name: list(item.levels) for item in ladder.items},
        together=ladder.together,
        dense_nll=native_nll,
        provenance=scorer.provenance,
        **meter.spent(1),
    )


class _Search:
    """Finds the item to lower next, and adds it to the profile."""

    def __init__(
        self,
        scorer: PlanScorer,
        state: LadderState,
        profile: GSIProfile,
        stop: int | None,
        on_score: OnScore | None,
    ) -> None:
        self.profile = profile
        self._scorer, self._state, self._on_score = scorer, state, on_score
        self._ladder = state.costs.ladder
        steps = sum(len(item.levels) - 1 for item in self._ladder.items)
        self._stop = min(stop or steps, steps)
        self._names = [item.name for item in self._ladder.items]
        self._by_bytes = isinstance(state, PricedState)
        self._exact = profile.method == "exact"
        for name in profile.order:
            state.lower(self._ladder.numbers[name])

    def next(self) -> int | None:
        """Measure a round; None if there is nothing left to lower."""
        state, profile, meter = self._state, self.profile, ScoringMeter(self._scorer)
        items = filter(state.is_valid, range(len(self._ladder)))
        freed = {item: 1 for item in items if state.companions(item)[0] == item}
        if isinstance(state, PricedState):
            freed = {item: size for item in freed if (size := state.step_bytes(item)) > 0}
        if not freed or len(profile.order) >= self._stop:
            return None
        best, nll, rises = self._measure(freed)
        named = {self._names[item]: rise for item, rise in rises.items()}
        last_rises = profile.last_rises | named
        for item in state.changes(state.preview(best)):  # their next step is another one then
            last_rises.pop(self._names[item], None)
        first_nll = {name: profile.dense_nll + rise for name, rise in named.items()}
        self.profile = replace(
            profile,
            order=(*profile.order, self._names[best]),
            nll_after=(*profile.nll_after, nll),
            first_nll=profile.first_nll or first_nll,
            last_rises=last_rises,
            candidates=(*profile.candidates, len(rises)),
            **profile.with_added(meter.spent(len(rises))),
        )
        return best

    def _measure(self, freed: Mapping[int, int]) -> tuple[int, float, dict[int, float]]:
        """The best item, the NLL after it, and the rise of all examined items.

        The exact search measures all items. The lazy search measures a few items at a time,
        those with the least last known rise first.
        """
        profile, known = self.profile, self._known_rises(freed)
        before = (profile.dense_nll, *profile.nll_after)[-1]
        first_batch = len(freed)
        if known and not self._exact:
            first_batch = _LAZY_BATCH + (0 if self._by_bytes else _NEIGHBOURS)
        nll: dict[int, float] = {}
        rises: dict[int, float] = {}

        def measure(items: Sequence[int]) -> dict[int, tuple[float, int, int]]:
            plans = [self._ladder.plan(self._state.positions_after(item)) for item in items]
            nll.update(zip(items, self._scorer.nll_many(plans, self._on_score), strict=True))
            rises.update({item: nll[item] - before for item in items})
            return {item: self._price(item, rises[item], freed) for item in items}

        best = cheapest_step(
            self._likely_first(freed, known),
            measure,
            lambda item: self._price(item, known[item], freed),
            (first_batch, _LAZY_BATCH),
        )
        return best, nll[best], rises

    def _known_rises(self, items: Mapping[int, int]) -> dict[int, float]:
        """Last known rise of each item: measured, else predicted; empty if nothing is known."""
        state, rises = self._state, self.profile.last_rises
        if isinstance(state, PricedState):
            return {item: rises.get(self._names[item], state.step_rise(item)) for item in items}
        return {item: rises[self._names[item]] for item in items if rises}

    def _likely_first(self, freed: Mapping[int, int], known: Mapping[int, float]) -> list[int]:
        """Items, likely winners first.

        Of blocks, the neighbours of the block removed last come before the others: next to a
        removed block, the rise is often smaller than last known, because the neighbour's work
        was for the removed block. Elsewhere the rise mostly grows.
        """
        if not known:
            return list(freed)
        nearest: set[int] = set()
        if not self._by_bytes:
            removed = self._ladder.numbers[self.profile.order[-1]]
            kept_before = [item for item in freed if item < removed]
            kept_after = [item for item in freed if item > removed]
            nearest = {*kept_before[-1:], *kept_after[:1]}
        return sorted(
            freed, key=lambda item: (item not in nearest, self._price(item, known[item], freed))
        )

    def _price(self, item: int, rise: float, freed: Mapping[int, int]) -> tuple[float, int, int]:
        """Sort key: the rise, per byte where bytes count."""
        return (max(0.0, rise) if self._by_bytes else rise) / freed[item], -freed[item], item
