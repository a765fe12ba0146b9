"""Builds a frontier: real scores where a predictor expects something to be gained.

1. The dense model and every single removal.
2. For some prices of an attn block in ffn blocks, a path of removals that measures only the
   few blocks that were cheapest when last seen.
3. In rounds: fit a predictor to all scores so far; find which pairs of counts requests would
   use; let it improve the best known mask of each of these by swaps within a kind and by
   steps from neighbouring pairs; measure what it expects to gain most.
4. One path on to the end, unlooked at, so that the table has an answer to every budget.

The same scores give the same search, so an interrupted one is repeated out of the score store.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np

from rap_env.blocks import BlockMask
from rap_env.errors import InvalidRequestError
from rap_env.importance.frontier import Counts, Frontier, best_by_counts
from rap_env.importance.frontier_proposals import Uses, propose
from rap_env.importance.provenance import provenance_of
from rap_env.memory import MemoryModel
from rap_env.request import Request
from rap_env.scoring.predictor import Fit, Floats, LossPredictor, fit_predictor, to_rows
from rap_env.scoring.scorer import MaskScorer
from rap_env.scoring.store import mask_key

_LEAST_RISE = 1e-4  # nats per token; prices of removals that help would not compare

_CHOOSE_AGAIN = 1.5  # with so many times the scores, settings of the predictor are chosen anew

PRICES = (0.35, 0.7, 1.4, 2.8, np.inf)
"""Prices of an attn block in ffn blocks that paths are searched for."""


@dataclass(frozen=True)
class FrontierConfig:
    """How a frontier is searched.

    Attributes:
        evaluations: Masks that are scored at most; two for each block are needed in any case.
        deepest_loss: Paths and pairs of counts that lose more are left alone, nats per token.
        looks: Blocks that a path measures before it removes one.
        batch: Masks that are measured between two fits of the predictor.
        slack: Pairs of counts are of use to a request if the predictor expects them to lose at
            most this share more than the best pair.
        seed: Decides which scores choose the predictor's settings.

    Raises:
        InvalidRequestError: A number is out of its range.
    """

    evaluations: int = 3000
    deepest_loss: float = 3.0
    looks: int = 6
    batch: int = 64
    slack: float = 0.15
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.evaluations, self.looks, self.batch) < 1 or self.deepest_loss <= 0:
            raise InvalidRequestError(
                "evaluations, looks and batch of a frontier must be at least 1 and deepest_loss "
                f"above 0, not {asdict(self)}."
            )


def build_frontier(
    scorer: MaskScorer,
    requests: Sequence[Request],
    config: FrontierConfig = FrontierConfig(),
    on_score: Callable[[BlockMask], None] | None = None,
) -> Frontier:
    """Search the best masks for the pairs of counts that requests would use.

    Args:
        scorer: Measures masks on the calibration text.
        requests: Requests such as those that are to come; their bytes decide which pairs count.
        config: How to search.
        on_score: Called after each mask that was scored.

    Raises:
        NonFiniteScoreError: The model gave NaN or infinity.
    """
    began, ran = time.perf_counter(), scorer.evaluations
    search = _Search(scorer, config, on_score)
    search.paths()
    uses = Uses(MemoryModel(scorer.llm), requests)
    while search.left > 0 and search.round(uses):
        pass
    search.finish()
    return Frontier(
        num_blocks=search.blocks,
        dense_nll=search.dense_nll,
        scored={mask_key(mask): nll for mask, nll in search.nll.items()},
        evaluations_run=scorer.evaluations - ran,
        seconds=time.perf_counter() - began,
        settings={**asdict(config), "requests": len(requests)},
        provenance=provenance_of(scorer),
    )


class _Settings(NamedTuple):
    """Settings of the predictor, and how many masks they were chosen with."""

    masks: int
    reach: int
    ridge: float


class _Search:
    def __init__(
        self,
        scorer: MaskScorer,
        config: FrontierConfig,
        on_score: Callable[[BlockMask], None] | None,
    ) -> None:
        self._scorer, self._config, self._on_score = scorer, config, on_score
        self._settings: _Settings | None = None
        self.blocks = scorer.llm.facts.num_blocks
        self.nll: dict[BlockMask, float] = {}
        singles = [BlockMask.of(index) for index in range(self.blocks)]
        self.measure([BlockMask(), *singles])
        self.dense_nll = self.nll[BlockMask()]
        self.alone = np.array([self.loss(mask) for mask in singles])

    @property
    def left(self) -> int:
        """Masks that may still be scored, before the last path."""
        return self._config.evaluations - self.blocks - len(self.nll)

    def loss(self, mask: BlockMask) -> float:
        """Measured loss, nats per token."""
        return self.nll[mask] - self.dense_nll

    def measure(self, masks: Sequence[BlockMask]) -> None:
        """Score masks."""
        found = self._scorer.nll_many(masks, self._on_score) if masks else []
        self.nll |= dict(zip(masks, found, strict=True))

    def paths(self) -> None:
        """Removals one after the other, cheapest first, for each price of an attn block."""
        for price in PRICES:
            self._path(price)

    def _path(self, price: float) -> None:
        bytes_freed = np.array([min(price, 1.0), min(1 / price, 1.0)])[np.arange(self.blocks) % 2]
        rise, mask = self.alone.copy(), BlockMask()

        def dearness(index: int) -> float:
            return float(max(rise[index], _LEAST_RISE) / max(bytes_freed[index], 1e-9))

        while self.left > 0 and self.loss(mask) <= self._config.deepest_loss:
            kept = sorted((i for i in range(self.blocks) if i not in mask), key=dearness)
            wider = {index: mask | BlockMask.of(index) for index in kept[: self._config.looks]}
            if not wider:
                break
            self.measure(list(wider.values()))
            for index, candidate in wider.items():
                rise[index] = self.loss(candidate) - self.loss(mask)
            mask = wider[min(wider, key=dearness)]

    def finish(self) -> None:
        """From the mask with most removals, remove by one-shot importance until nothing is left."""
        mask = max(self.nll, key=lambda m: (len(m), -self.nll[m]))
        path = []
        for index in sorted(set(range(self.blocks)) - mask.indices, key=lambda i: self.alone[i]):
            mask |= BlockMask.of(index)
            path.append(mask)
        self.measure(path)

    def round(self, uses: Uses) -> bool:
        """Fit a predictor and measure what it proposes; False if it proposes nothing."""
        predictor = self._fit()
        best = best_by_counts(self.nll)
        expected = self._expected(best)
        gains: dict[BlockMask, tuple[float, float]] = {}
        for pair in sorted(uses.pairs(expected, self._config.slack)):
            found = propose(pair, best, predictor, self.nll)
            if found is not None:
                mask, predicted = found
                gain = float(expected[pair]) - predicted
                gains[mask] = gain, gain / (abs(float(expected[pair])) + predictor.offset)
        chosen = _alternately(gains)
        self.measure(chosen[: min(self._config.batch, self.left)])
        return bool(chosen)

    def _fit(self) -> LossPredictor:
        """A predictor fitted to all scores; its settings are chosen anew now and then."""
        masks = list(self.nll)
        rows, losses = to_rows(masks, self.blocks), np.array([self.loss(mask) for mask in masks])
        chosen = self._settings
        if chosen is None or len(masks) > _CHOOSE_AGAIN * chosen.masks:
            predictor, _ = fit_predictor(rows, losses, self.alone, seed=self._config.seed)
            self._settings = _Settings(len(masks), predictor.reach, predictor.ridge)
            return predictor
        fit = Fit(rows, losses, self.alone, [np.arange(len(masks))], reaches=(chosen.reach,))
        return fit.solved([0], chosen.reach, chosen.ridge)

    def _expected(self, best: dict[Counts, BlockMask]) -> Floats:
        """What the table gives each pair of counts: its best mask, or one with more removed."""
        layers = self.blocks // 2
        table = np.full((layers + 1, layers + 1), np.inf)
        for pair, mask in best.items():
            table[pair] = self.loss(mask)
        for axis in (0, 1):
            table = np.flip(np.minimum.accumulate(np.flip(table, axis), axis), axis)
        return np.where(table <= self._config.deepest_loss, table, np.inf)


def _alternately(gains: Mapping[BlockMask, tuple[float, float]]) -> list[BlockMask]:
    """Masks that promise most, in nats and as a share in turn: else one kind of pair takes all."""
    orders = [sorted(gains, key=lambda mask: -gains[mask][kind]) for kind in (0, 1)]
    return list(dict.fromkeys(chain.from_iterable(zip(*orders, strict=True))))
