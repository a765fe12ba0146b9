"""A good one of several masks, where most of them see a part of the text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rap_env.blocks import BlockMask
from rap_env.scoring.loss import window_nll
from rap_env.scoring.mask_runner import chunks
from rap_env.scoring.race import Race, Racer, share_of
from rap_env.scoring.scorer import MaskScorer, tick

_MOST_TRAILS = 16  # masks whose states may be held at once


@dataclass(frozen=True)
class Stage:
    """One stage of a race.

    Attributes:
        batches: Batches of the text that are run in it.
        most: Masks that run them, those that did best until then.
    """

    batches: tuple[int, ...]
    most: int


def halve(
    scorer: MaskScorer,
    masks: Sequence[BlockMask],
    stages: Sequence[Stage],
    *,
    rank: Callable[[Racer], float] = lambda racer: racer.nll,
    on_score: Callable[[BlockMask], None] | None = None,
) -> list[Racer]:
    """Race masks through a text in stages, each with more of the text and fewer masks.

    Successive halving (Karnin, Koren and Somekh, Almost Optimal Exploration in Multi-Armed
    Bandits, ICML 2013). Nothing is stored: what a part of a text adds is no score of it.

    Args:
        scorer: Whose text is run.
        masks: At least one; the first of equals wins.
        stages: Each batch of the text stands in one of them.
        rank: What decides who goes on, the least first; by default what the batches that were
            run add to the NLL. The last stage's masks are compared by their NLL.
        on_score: Called after each mask that leaves the race.

    Returns:
        All masks with what each batch that they were run on adds to the text's NLL, the winner
        first: it was run on the whole text.

    Raises:
        NonFiniteScoreError: The model gave NaN or infinity.
    """
    race, partial = Race(scorer, masks), scorer.runner.partial
    alive = [Racer(mask) for mask in masks]
    left: list[Racer] = []
    with scorer.llm.masked(BlockMask()):
        for number, stage in enumerate(stages):
            ranked = sorted(alive, key=rank) if number else alive
            alive = ranked[: stage.most]
            left = ranked[stage.most :] + left
            for racer in ranked[stage.most :]:
                racer.trail.clear()  # frees its states
                scorer.count(racer.mask)
            tick(on_score, [racer.mask for racer in ranked[stage.most :]])
            for batch in stage.batches:
                for group in chunks(alive, scorer.in_flight):
                    race.run(group, batch, trails=len(alive) <= _MOST_TRAILS)
                    for racer in group:
                        hidden = racer.hidden.pop(batch)
                        nll = window_nll(partial, hidden, scorer.batches[batch]).mean()
                        share = race.shares[batch]
                        racer.parts[batch] = share_of(scorer, racer.mask, share, nll)
    alive.sort(key=lambda racer: racer.nll)
    race.crown(alive[0])
    for racer in alive:
        racer.trail.clear()
        scorer.count(racer.mask)
    tick(on_score, [racer.mask for racer in alive])
    return [*alive, *left]
