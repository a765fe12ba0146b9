"""Strategies that find the next block of GSI: exact, and lazy greedy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from rap_env.blocks import Block
from rap_env.plan import Plan
from rap_env.scoring.mask_search import find_best_mask
from rap_env.scoring.scorer import MaskScorer

OnScore = Callable[[Plan], None]

_NEIGHBOURS = 2
_LAZY_BATCH = 6


@dataclass(frozen=True)
class GSIState:
    """State of the search before a round.

    Attributes:
        order: Blocks removed so far, in order.
        nll: NLL without them, nats per token.
        delta_nll: Last known rise in NLL if each kept block is removed too, nats per token, by
            index; empty before the first round.
        last: Whether this round is the last one.
    """

    order: tuple[int, ...]
    nll: float
    delta_nll: Mapping[int, float] = field(default_factory=dict)
    last: bool = False

    @property
    def removed(self) -> Plan:
        """The blocks removed so far."""
        return Plan.removing(*self.order)


@dataclass(frozen=True)
class RoundResult:
    """Result of a round.

    Attributes:
        block: Index of the block to remove next.
        nll: NLL if it is removed too, nats per token.
        delta_nll: Rise in NLL for each examined block, nats per token, by index.
    """

    block: int
    nll: float
    delta_nll: dict[int, float]


class GSIStrategy(ABC):
    """Finds the block to remove next, with a scorer of the calibration text."""

    def __init__(self, scorer: MaskScorer) -> None:
        self.scorer = scorer

    @abstractmethod
    def next(self, state: GSIState, on_score: OnScore) -> RoundResult:
        """Find the block whose removal raises the NLL least.

        `on_score` is called after each examined mask.
        """

    @property
    def block_forwards(self) -> float:
        """Blocks that the model ran so far, in passes over the whole text."""
        return self.scorer.block_forwards

    @property
    def evaluations(self) -> int:
        """Masks that the model ran so far."""
        return self.scorer.evaluations

    def _scan(self, state: GSIState, on_score: OnScore) -> RoundResult:
        """Measure every candidate on the whole text."""
        found = self.scorer.scan(state.removed, on_score)
        return _result(state, {block.index: nll for block, nll in found.items()})

    def _candidates(self, state: GSIState) -> list[tuple[Block, Plan]]:
        """Blocks with the masks that remove them too, likely winners first.

        The neighbours of the block removed last come before the others: next to a removed block,
        the rise is often smaller than last known, because the neighbour's work was for the
        removed block. Elsewhere the rise mostly grows.
        """
        found = self.scorer.candidates(state.removed)
        nearest = nearest_kept(state.order[-1], [block.index for block in found])

        def likely(item: tuple[Block, Plan]) -> tuple[bool, float, int]:
            index = item[0].index
            return index not in nearest, state.delta_nll[index], index

        return sorted(found.items(), key=likely)


class ExactStrategy(GSIStrategy):
    """Always finds the block of the least NLL; drops candidates that cannot win.

    The first and the last round measure all candidates on the whole text, because their results
    are what is known of single blocks afterwards.
    """

    def next(self, state: GSIState, on_score: OnScore) -> RoundResult:
        """As in `GSIStrategy`."""
        if state.last or not state.order:
            return self._scan(state, on_score)
        return self._best(state, self._candidates(state), state.removed, on_score)

    def _best(
        self,
        state: GSIState,
        candidates: Sequence[tuple[Block, Plan]],
        near: Plan | None,
        on_score: OnScore,
    ) -> RoundResult:
        masks = [mask for _, mask in candidates]
        found = find_best_mask(self.scorer, masks, near=near, on_score=on_score)
        delta_nll = {}
        for block, mask in candidates:
            # A mask may be dropped after a small part of the text. The last known rise of its
            # block is then more informative than the lower bound.
            if mask in found.nll:
                delta_nll[block.index] = found.nll[mask] - state.nll
            else:
                at_least = found.lower_bounds[mask] - state.nll
                delta_nll[block.index] = max(at_least, state.delta_nll[block.index])
        nll = {block.index: found.nll[mask] for block, mask in candidates if mask in found.nll}
        measured = _result(state, nll)
        return RoundResult(measured.block, measured.nll, delta_nll)


class LazyStrategy(ExactStrategy):
    """Measures only the most promising candidates again, and more if their rise has grown.

    After the neighbours of the block removed last, candidates are taken in the order of their
    last known rise, a few at a time, until the best of those just measured is no worse than the
    last known rise of the next one. Without the neighbours this is Minoux's lazy greedy algorithm
    (1978): exact if the rise only grows as the model shrinks, which is mostly the case.
    """

    def next(self, state: GSIState, on_score: OnScore) -> RoundResult:
        """As in `GSIStrategy`."""
        if not state.order:
            return self._scan(state, on_score)
        waiting = self._candidates(state)
        tried: list[tuple[Block, Plan]] = []
        delta_nll: dict[int, float] = {}
        count = _LAZY_BATCH + _NEIGHBOURS
        while True:
            tried, waiting, count = [*tried, *waiting[:count]], waiting[count:], _LAZY_BATCH
            result = self._best(state, tried, None, on_score)
            delta_nll |= result.delta_nll
            if not waiting or result.nll - state.nll <= state.delta_nll[waiting[0][0].index]:
                return RoundResult(result.block, result.nll, delta_nll)
            # The best candidate so far is compared with the next few; its score is known.
            tried = [(block, mask) for block, mask in tried if block.index == result.block]


def nearest_kept(index: int, kept: Sequence[int]) -> set[int]:
    """The nearest kept block on either side of a removed block."""
    before, after = [i for i in kept if i < index], [i for i in kept if i > index]
    return {*before[-1:], *after[:1]}


def _result(state: GSIState, nll: Mapping[int, float]) -> RoundResult:
    """The first of the blocks whose NLL is least."""
    least = min(nll, key=lambda index: (nll[index], index))
    rises = {index: value - state.nll for index, value in nll.items()}
    return RoundResult(least, nll[least], rises)


STRATEGIES: dict[str, type[GSIStrategy]] = {
    "exact": ExactStrategy,
    "lazy": LazyStrategy,
}
"""Strategies by the name of their method."""
