"""GSI over items: lower the item of the least cost per byte, measure again, repeat.

The greedy order of `rap_env.importance.ladder_order` adds up what each level costs alone. Removals
do not add up: a plan that removes many blocks costs more than that, or less. This search measures
the model's NLL again after each step.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from rap_env.errors import ArtifactError, check_name
from rap_env.importance.ladder_order import LadderOrder, LadderWalk, Step, greedy_order
from rap_env.importance.level_costs import LevelCosts
from rap_env.importance.profiles import Profile
from rap_env.ladder.item_bytes import LadderBytes
from rap_env.ladder.items import Ladder
from rap_env.models.progress import progress_bar
from rap_env.scoring.scorer import MaskScorer

METHODS = ("lazy", "exact")
"""``"exact"`` measures every item in each round; ``"lazy"`` the most promising ones."""

_LAZY_BATCH = 6


@dataclass(frozen=True, kw_only=True)
class ItemGSIProfile(Profile):
    """The result of GSI over the items of a ladder, on one model and text.

    Attributes:
        method: One of `METHODS`.
        levels: The levels of each item, by its name.
        together: Levels that all caches take together.
        native_nll: NLL of the native model, nats per token.
        actions: Names of the items in the order in which they are lowered by one level; may stop
            before all are at their lowest.
        nll_after: NLL after each action, nats per token.
        last_rise: Last measured rise in NLL of the next step of items, by name.
        candidates: Plans measured in each round.
    """

    KIND = "item GSI profile"
    FORMAT = 1

    method: str
    levels: dict[str, list[str]]
    together: tuple[str, ...]
    native_nll: float
    actions: tuple[str, ...]
    nll_after: tuple[float, ...]
    last_rise: dict[str, float]
    candidates: tuple[int, ...]

    def order(self, costs: LevelCosts, item_bytes: LadderBytes) -> LadderOrder:
        """The measured order, continued by the greedy one.

        The ΔNLL of steps taken together is divided in proportion to their predicted ones.

        Raises:
            ArtifactError: The profile is of another ladder.
        """
        check_ladder(self, item_bytes.ladder)
        walk, first = LadderWalk(costs, item_bytes), list[tuple[Step, float]]()
        before = self.native_nll
        for name, nll in zip(self.actions, self.nll_after, strict=True):
            steps = walk.steps(item_bytes.ladder.numbers[name])
            predicted = sum(rise for _, rise in steps)
            for step, rise in steps:
                share = rise / predicted if predicted > 0 else 1 / len(steps)
                first.append((step, (nll - before) * share))
            walk.take(step for step, _ in steps)
            before = nll
        return greedy_order(costs, item_bytes, first)


def check_ladder(profile: ItemGSIProfile, ladder: Ladder) -> None:
    """Raise an `ArtifactError` unless a profile is of a ladder."""
    if (profile.levels, profile.together) != (_levels(ladder), ladder.together):
        raise ArtifactError(
            "The GSI profile was measured for other levels; give the levels that it was measured "
            "for, or measure another one."
        )


def item_gsi(
    scorer: MaskScorer,
    costs: LevelCosts,
    item_bytes: LadderBytes,
    *,
    method: str = "lazy",
    stop: int | None = None,
    path: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> ItemGSIProfile:
    """Find the order in which to lower items so that the NLL rises least per freed byte.

    Args:
        scorer: Measures plans on the calibration text.
        costs: One-shot costs: what is known of a step that was not measured yet.
        item_bytes: The ladder and its bytes. Steps are weighed at the reference request of
            `LadderWalk`; those that free nothing there are not taken.
        method: ``"exact"`` measures the next step of every item in each round. ``"lazy"`` measures
            those with the least last known cost per byte, a few at a time, until the best of them
            is no worse than the last known cost of the next one (Minoux 1978).
        stop: Actions after which to stop; None continues until nothing is left.
        path: File of the artifact. It is written after each action. A profile of the same model,
            text and ladder that already exists there is continued.
        progress: Whether to draw a progress bar.

    Raises:
        UnknownNameError: An unknown method.
        ArtifactError: The file at `path` is damaged, or of another model, text, method or ladder.
    """
    with progress_bar(progress, desc="GSI", unit="action", total=stop, leave=False) as bar:
        for profile in item_gsi_rounds(scorer, costs, item_bytes, method, stop, path):
            bar.update(len(profile.actions) - bar.n)
    return profile


def item_gsi_rounds(
    scorer: MaskScorer,
    costs: LevelCosts,
    item_bytes: LadderBytes,
    method: str = "lazy",
    stop: int | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Iterator[ItemGSIProfile]:
    """Run `item_gsi`, and yield the profile at the start and after each action."""
    check_name("method of GSI over items", method, METHODS)
    ladder = item_bytes.ladder
    profile = _start(scorer, ladder, method, path)
    walk = LadderWalk(costs, item_bytes)
    for name in profile.actions:
        walk.take(step for step, _ in walk.steps(ladder.numbers[name]))
    yield profile
    while stop is None or len(profile.actions) < stop:
        following = _next_round(scorer, walk, profile)
        if following is None:
            return
        profile = following
        if path is not None:
            profile.save(path)
        yield profile


def _start(
    scorer: MaskScorer, ladder: Ladder, method: str, path: str | os.PathLike[str] | None
) -> ItemGSIProfile:
    """An empty profile, or the one saved at `path`."""
    if path is not None and Path(path).exists():
        found = ItemGSIProfile.load(path, scorer.llm)
        check_ladder(found, ladder)
        if found.method != method or found.provenance["scoring"] != dict(scorer.context):
            raise ArtifactError(
                f"{os.fspath(path)} was measured with method={found.method!r} on "
                f"{found.provenance['text']}, not with {method!r} on this text; give another path "
                "or delete it."
            )
        return found
    before = scorer.evaluations, scorer.block_forwards
    native_nll = scorer.dense_nll
    return ItemGSIProfile(
        method=method,
        levels=_levels(ladder),
        together=ladder.together,
        native_nll=native_nll,
        actions=(),
        nll_after=(),
        last_rise={},
        candidates=(),
        evaluations=1,  # the native model
        evaluations_run=scorer.evaluations - before[0],
        block_forwards=scorer.block_forwards - before[1],
        seconds=0.0,
        provenance=scorer.provenance,
    )


def _next_round(
    scorer: MaskScorer, walk: LadderWalk, profile: ItemGSIProfile
) -> ItemGSIProfile | None:
    """Lower the item of the least measured cost per byte; None if no step frees bytes."""
    began = time.perf_counter()
    before = scorer.evaluations, scorer.block_forwards
    ladder, names = walk.ladder, [item.name for item in walk.ladder.items]
    nll = (profile.native_nll, *profile.nll_after)[-1]
    freed = {n: walk.freed_bytes(n, walk.next_of(n)) for n in _first_of_each(walk)}
    freed = {item: size for item, size in freed.items() if size > 0}
    if not freed:
        return None
    known = {
        item: profile.last_rise.get(names[item], walk.rise(item, walk.next_of(item)))
        for item in freed
    }

    def price(item: int, rise: float) -> tuple[float, int, int]:
        return max(0.0, rise) / freed[item], -freed[item], item

    waiting = sorted(freed, key=lambda item: price(item, known[item]))
    batch = len(waiting) if profile.method == "exact" else _LAZY_BATCH
    measured: dict[int, float] = {}
    while waiting:
        tried, waiting = waiting[:batch], waiting[batch:]
        plans = [ladder.plan(_positions_after(walk, item)) for item in tried]
        measured |= dict(zip(tried, scorer.nll_many(plans), strict=True))
        best = min(measured, key=lambda item: price(item, measured[item] - nll))
        if waiting and price(best, measured[best] - nll) <= price(waiting[0], known[waiting[0]]):
            break
    rises = {names[item]: value - nll for item, value in measured.items()}
    changed = walk.take([step for step, _ in walk.steps(best)])
    last_rise = {**profile.last_rise, **rises}
    for item in changed:  # their next step is another one now
        last_rise.pop(names[item], None)
    return replace(
        profile,
        actions=(*profile.actions, names[best]),
        nll_after=(*profile.nll_after, measured[best]),
        last_rise=last_rise,
        candidates=(*profile.candidates, len(measured)),
        evaluations=profile.evaluations + len(measured),
        evaluations_run=profile.evaluations_run + scorer.evaluations - before[0],
        block_forwards=profile.block_forwards + scorer.block_forwards - before[1],
        seconds=profile.seconds + time.perf_counter() - began,
    )


def _first_of_each(walk: LadderWalk) -> list[int]:
    """The items that can be lowered, only the first of those that are taken together."""
    lowerable = (n for n in range(len(walk.ladder)) if walk.next_of(n) >= 0)
    return [item for item in lowerable if walk.takers(item)[0] == item]


def _positions_after(walk: LadderWalk, item: int) -> list[int]:
    positions = walk.positions.copy()
    for (one, position), _ in walk.steps(item):
        positions[one] = position
    return positions


def _levels(ladder: Ladder) -> dict[str, list[str]]:
    return {item.name: list(item.levels) for item in ladder.items}
