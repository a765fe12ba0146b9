"""The best of several masks, without measuring those to the end that do not become it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from rap_env.blocks import BlockMask
from rap_env.scoring.loss import VocabularyBound, window_nll
from rap_env.scoring.mask_runner import chunks
from rap_env.scoring.race import Race, Racer, share_of
from rap_env.scoring.scorer import MaskScorer, tick

Price = Callable[[BlockMask, float], float]
"""What is to be least, from a mask and its NLL; it must not fall as the NLL grows."""

Tick = Callable[[BlockMask], None]


def _nll_itself(_mask: BlockMask, nll: float) -> float:
    return nll


@dataclass(frozen=True)
class Found:
    """What a search knows at its end, nats per token.

    Attributes:
        best: The mask of the least price; of equal ones the first that was given.
        nll: NLL of every mask that was measured to the end.
        at_least: For the others a bound that their NLL is not below (but for rounding).
    """

    best: BlockMask
    nll: dict[BlockMask, float]
    at_least: dict[BlockMask, float]


class LeastSearch:
    """Finds the best of some masks, exactly, and drops each as soon as it cannot win.

    The NLL of a text is a sum of terms that are not negative, so what a part of the text adds
    bounds the whole from below. So does, for the part that was run, the NLL over a part of the
    vocabulary (`VocabularyBound`): few masks ever meet the whole head. Masks that are likely to
    win should come first.

    Args:
        scorer: Whose masks are measured; those that are measured to the end it knows afterwards.
    """

    def __init__(self, scorer: MaskScorer) -> None:
        self._scorer = scorer

    def least(
        self,
        masks: Sequence[BlockMask],
        *,
        price: Price = _nll_itself,
        near: BlockMask | None = None,
        on_score: Tick | None = None,
    ) -> Found:
        """Find the mask of the least price.

        Args:
            masks: At least one; likely winners first.
            price: What is to be least; by default the NLL.
            near: A mask whose likely words bound the NLL of the others: the closer, the tighter.
                It costs as much as measuring a mask. None: no such bound, which is better for a
                few masks of nearly the same NLL.
            on_score: Called after each mask that was measured or dropped.

        Raises:
            NonFiniteScoreError: The model gave NaN or infinity.
        """
        if self._scorer.llm.spare_bytes is not None:
            # Memory is capped: none for likely words, nor for the outputs of all who may win.
            nll = dict(zip(masks, self._scorer.nll_many(masks, on_score), strict=True))
            return Found(min(masks, key=lambda m: price(m, nll[m])), nll, {})
        known = {m: float(v.mean()) for m in masks if (v := self._scorer.look_up(m)) is not None}
        missing = [mask for mask in masks if mask not in known]
        at_least: dict[BlockMask, float] = {}
        if missing:
            with self._scorer.llm.masked(BlockMask()):
                bound = None if near is None else self._vocabulary(near)
                contest = _Contest(self._scorer, Race(self._scorer, masks), bound, price, known)
                for group in chunks(missing, self._scorer.in_flight):
                    at_least |= contest.enter(group)
                    tick(on_score, group)
                contest.end()
        measured = [mask for mask in masks if mask in known]
        return Found(min(measured, key=lambda m: price(m, known[m])), known, at_least)

    def _vocabulary(self, near: BlockMask) -> VocabularyBound:
        """The likely entries under a mask."""
        race, racer = Race(self._scorer, [near]), Racer(near)
        batches = self._scorer.batches
        for batch in range(len(batches)):
            race.run([racer], batch)
        hidden = [racer.hidden[batch] for batch in range(len(batches))]
        return VocabularyBound(self._scorer.runner.partial, hidden, batches)


class _Contest:
    """One search: runs masks, and knows which is the best so far."""

    def __init__(
        self,
        scorer: MaskScorer,
        race: Race,
        bound: VocabularyBound | None,
        price: Price,
        known: dict[BlockMask, float],
    ) -> None:
        self._scorer, self._race, self._bound, self._price = scorer, race, bound, price
        self._known = known  # NLL of those measured to the end; grows
        self._best = min((price(mask, nll) for mask, nll in known.items()), default=math.inf)
        self._tolerance = 0.0 if bound is None else bound.tolerance
        self._winner: Racer | None = None

    def enter(self, masks: Sequence[BlockMask]) -> dict[BlockMask, float]:
        """Run masks; gives the bounds of those that were dropped."""
        racers = [Racer(mask) for mask in masks]
        alive = racers
        for batch in range(len(self._scorer.batches)):
            self._race.run(alive, batch)
            for racer in alive:
                self._first_look(racer, batch)
            alive = [racer for racer in alive if not self._hopeless(racer)]
        for mask in masks:
            self._scorer.count(mask)
        for racer in sorted(alive, key=lambda r: self._price(r.mask, r.nll)):
            self._finish(racer)
        return {racer.mask: racer.nll for racer in racers if racer.mask not in self._known}

    def end(self) -> None:
        """Let the winner's states be known."""
        if self._winner is not None:
            self._race.crown(self._winner)

    def _first_look(self, racer: Racer, batch: int) -> None:
        """What a batch is known to add at least; without a bound, what it adds."""
        if self._bound is None:
            self._measure(racer, batch)
        else:
            self._add(racer, batch, self._bound.window_nll(batch, racer.hidden[batch]))

    def _finish(self, racer: Racer) -> None:
        """Measure a mask with the whole head, unless it turns out that it cannot win."""
        for batch in range(len(self._scorer.batches)):
            if self._hopeless(racer):
                return
            if batch not in racer.windows:
                self._measure(racer, batch)
        values = torch.cat([racer.windows[b] for b in range(len(racer.windows))]).cpu().numpy()
        self._scorer.record(racer.mask, values)
        self._known[racer.mask] = float(values.mean())
        price = self._price(racer.mask, self._known[racer.mask])
        if price < self._best:
            self._best, self._winner = price, racer

    def _measure(self, racer: Racer, batch: int) -> None:
        hidden, ids = racer.hidden[batch], self._scorer.batches[batch]
        racer.windows[batch] = window_nll(self._scorer.runner.partial, hidden, ids)
        self._add(racer, batch, racer.windows[batch])

    def _add(self, racer: Racer, batch: int, windows: torch.Tensor) -> None:
        share = self._race.shares[batch]
        racer.parts[batch] = share_of(self._scorer, racer.mask, share, windows.mean())

    def _hopeless(self, racer: Racer) -> bool:
        return self._price(racer.mask, racer.nll - self._tolerance) > self._best
