"""How a round of GSI finds the block that is missed least: three ways of measuring less."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from rap_env.blocks import Block, BlockMask
from rap_env.scoring.halving import Stage, halve
from rap_env.scoring.race import Racer
from rap_env.scoring.scorer import MaskScorer
from rap_env.scoring.search import LeastSearch

Tick = Callable[[BlockMask], None]

_NEIGHBOURS = 2
_LAZY_WIDTH = 6
_HALVING_PARTS = 4
_HALVING_POOL = 8
_SEMIFINALISTS = 4
_FINALISTS = 3


@dataclass(frozen=True)
class Standing:
    """Where the removal stands before a round.

    Attributes:
        order: Blocks removed so far, in order.
        nll: NLL without them, nats per token.
        losses: What removing each kept block as well was last known to add, nats per token, by
            index; empty before the first round.
        last: Whether this round is the last one.
    """

    order: tuple[int, ...]
    nll: float
    losses: Mapping[int, float] = field(default_factory=dict)
    last: bool = False

    @property
    def removed(self) -> BlockMask:
        """The blocks removed so far."""
        return BlockMask.of(*self.order)


@dataclass(frozen=True)
class RoundResult:
    """What a round found.

    Attributes:
        block: Index of the block to remove next.
        nll: NLL without it too, nats per token.
        losses: What removing each block that was looked at adds, nats per token, by index.
    """

    block: int
    nll: float
    losses: dict[int, float]


class Rounds(ABC):
    """A way to find the next block.

    Args:
        scorer: Measures masks on the calibration text.
    """

    def __init__(self, scorer: MaskScorer) -> None:
        self.scorer = scorer

    @abstractmethod
    def next(self, at: Standing, tick: Tick) -> RoundResult:
        """Find the block that is missed least.

        Args:
            at: Where the removal stands.
            tick: Called after each mask that was looked at.

        Raises:
            NonFiniteScoreError: The model gave NaN or infinity.
        """

    @property
    def block_forwards(self) -> float:
        """Blocks that were really run so far, as multiples of the whole text."""
        return self.scorer.block_forwards

    @property
    def evaluations(self) -> int:
        """Masks that were really run so far."""
        return self.scorer.evaluations

    def _scan(self, at: Standing, tick: Tick) -> RoundResult:
        """Measure every candidate to the end."""
        found = self.scorer.scan(at.removed, tick)
        return _result(at, {block.index: nll for block, nll in found.items()})

    def _candidates(self, at: Standing) -> list[tuple[Block, BlockMask]]:
        """Blocks with the masks that remove them too, likely winners first.

        Those beside the block removed last come before the others: next to a gap a block often
        loses less than it was known to (its own work was for the one that went), while
        elsewhere losses mostly grow.
        """
        found = self.scorer.candidates(at.removed)
        nearest = beside(at.order[-1], [block.index for block in found])

        def likely(item: tuple[Block, BlockMask]) -> tuple[bool, float, int]:
            index = item[0].index
            return index not in nearest, at.losses[index], index

        return sorted(found.items(), key=likely)


class ExactRounds(Rounds):
    """The block of the least NLL, always. Candidates are dropped once they cannot be it.

    The first and the last round measure all of them to the end, since what they find is
    what is known of single blocks afterwards.
    """

    def __init__(self, scorer: MaskScorer) -> None:
        super().__init__(scorer)
        self._search = LeastSearch(scorer)

    def next(self, at: Standing, tick: Tick) -> RoundResult:
        """As in `Rounds`."""
        if at.last or not at.order:
            return self._scan(at, tick)
        return self._least(at, self._candidates(at), at.removed, tick)

    def _least(
        self,
        at: Standing,
        candidates: Sequence[tuple[Block, BlockMask]],
        near: BlockMask | None,
        tick: Tick,
    ) -> RoundResult:
        masks = [mask for _, mask in candidates]
        found = self._search.least(masks, near=near, on_score=tick)
        losses = {}
        for block, mask in candidates:
            # A mask may be dropped before much of the text is added up: then what was known
            # of its block before says more.
            if mask in found.nll:
                losses[block.index] = found.nll[mask] - at.nll
            else:
                at_least = found.at_least[mask] - at.nll
                losses[block.index] = max(at_least, at.losses[block.index])
        measured = _result(at, {b.index: found.nll[m] for b, m in candidates if m in found.nll})
        return RoundResult(measured.block, measured.nll, losses)


class LazyRounds(ExactRounds):
    """Re-measures the most promising candidates alone, and more of them where one surprises.

    After the neighbours of the block removed last, candidates are taken by their last known
    loss, a few at a time, until the best of those just measured is no worse than what the next
    one was last known to lose. Minoux's lazy greedy algorithm (1978) is that without the
    neighbours: exact where losses only grow as the model shrinks, which they mostly do.
    """

    def next(self, at: Standing, tick: Tick) -> RoundResult:
        """As in `Rounds`."""
        if not at.order:
            return self._scan(at, tick)
        waiting = self._candidates(at)
        tried: list[tuple[Block, BlockMask]] = []
        losses: dict[int, float] = {}
        width = _LAZY_WIDTH + _NEIGHBOURS
        while True:
            tried, waiting, width = [*tried, *waiting[:width]], waiting[width:], _LAZY_WIDTH
            result = self._least(at, tried, None, tick)
            losses |= result.losses
            if not waiting or result.nll - at.nll <= at.losses[waiting[0][0].index]:
                return RoundResult(result.block, result.nll, losses)
            # The best of those measured meets the next few; its score is known.
            tried = [(block, mask) for block, mask in tried if block.index == result.block]


class HalvingRounds(Rounds):
    """Most candidates see a part of the text, the better ones more of it, few all of it.

    From the second round on, the race is between the neighbours of the block removed last and the
    candidates of the least last known losses. What a part of the text says is compared with
    what the same part said of the same block before: the change of its loss is known far better
    from a few windows than the loss itself.
    """

    def __init__(self, scorer: MaskScorer) -> None:
        super().__init__(scorer)
        windows, length = scorer.corpus.tokens.shape
        rows = max(1, windows // _HALVING_PARTS)
        self._parts = MaskScorer(scorer.llm, scorer.corpus, batch_tokens=rows * length)
        self._shares = [len(ids) / windows for ids in self._parts.batches]
        self._base: dict[int, float] = {}  # what each part adds to the NLL of the base
        self._base_order: tuple[int, ...] | None = None
        self._known: dict[int, dict[int, float]] = {}  # by block and part: last known loss

    @property
    def block_forwards(self) -> float:
        """Blocks that were really run so far, as multiples of the whole text."""
        return self.scorer.block_forwards + self._parts.block_forwards

    @property
    def evaluations(self) -> int:
        """Masks that were really run so far, most of them on a part of the text."""
        return self.scorer.evaluations + self._parts.evaluations

    def next(self, at: Standing, tick: Tick) -> RoundResult:
        """As in `Rounds`."""
        if self._base_order != at.order:
            everything = Stage(tuple(range(len(self._shares))), 1)
            self._base = halve(self._parts, [at.removed], [everything])[0].parts
        pool, stages = self._pool(at)
        blocks = {mask: block.index for block, mask in pool}

        def loss(racer: Racer) -> float:
            return self._loss(at, blocks[racer.mask], racer)

        masks = [mask for _, mask in pool]
        racers = halve(self._parts, masks, stages, rank=loss, on_score=tick)
        losses = {blocks[racer.mask]: loss(racer) for racer in racers}
        for racer in racers:
            self._learn(blocks[racer.mask], racer, losses[blocks[racer.mask]])
        winner = racers[0]
        self._base, self._base_order = winner.parts, (*at.order, blocks[winner.mask])
        return RoundResult(blocks[winner.mask], winner.nll, losses)

    def _pool(self, at: Standing) -> tuple[list[tuple[Block, BlockMask]], list[Stage]]:
        """Who races, and how much of the text the first half, quarter and so on of them see."""
        parts = range(len(self._shares))
        if not at.order:
            pool = list(self.scorer.candidates(at.removed).items())
            cuts = [(parts[:2], len(pool)), (parts[2:], _FINALISTS)]
        else:
            pool = self._candidates(at)[:_HALVING_POOL]
            # Not always the same part first: what it happens to like would be removed first.
            turn = len(at.order) % min(2, len(parts))  # a text of one part has no other
            first, second = parts[turn : turn + 1], parts[1 - turn : 2 - turn]
            cuts = [(first, len(pool)), (second, _SEMIFINALISTS), (parts[2:], _FINALISTS)]
        return pool, [Stage(tuple(batches), most) for batches, most in cuts if batches]

    def _loss(self, at: Standing, block: int, racer: Racer) -> float:
        """What a block's removal adds, as far as is known from the parts that it was run on."""
        new = self._losses(racer)
        known = self._known.get(block, {})
        both = [part for part in new if part in known]
        if not both or len(new) == len(self._shares):
            return self._mean(new)
        before = {part: known[part] for part in both}
        now = {part: new[part] for part in both}
        return at.losses[block] + self._mean(now) - self._mean(before)

    def _learn(self, block: int, racer: Racer, loss: float) -> None:
        """Keep what each part says; parts that were not run are taken to have changed alike."""
        new = self._losses(racer)
        known = self._known.get(block, {})
        if known and len(new) < len(self._shares):
            change = loss - self._mean(known)
            new = {part: value + change for part, value in known.items()} | new
        self._known[block] = new

    def _losses(self, racer: Racer) -> dict[int, float]:
        """Loss over the base on each part that was run, nats per token of that part."""
        return {
            part: (nll - self._base[part]) / self._shares[part] for part, nll in racer.parts.items()
        }

    def _mean(self, losses: Mapping[int, float]) -> float:
        weight = sum(self._shares[part] for part in losses)
        return sum(loss * self._shares[part] for part, loss in losses.items()) / weight


def beside(index: int, kept: Sequence[int]) -> set[int]:
    """The nearest kept block on either side of a removed one."""
    before, after = [i for i in kept if i < index], [i for i in kept if i > index]
    return {*before[-1:], *after[:1]}


def _result(at: Standing, nll: Mapping[int, float]) -> RoundResult:
    """The first of the blocks whose NLL is least."""
    least = min(nll, key=lambda index: (nll[index], index))
    return RoundResult(least, nll[least], {index: value - at.nll for index, value in nll.items()})


METHODS: dict[str, type[Rounds]] = {
    "exact": ExactRounds,
    "lazy": LazyRounds,
    "halving": HalvingRounds,
}
"""Ways to find the next block, by name."""
