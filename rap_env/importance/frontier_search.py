"""Builds a frontier: measures the masks for which a predictor expects the greatest gain.

1. Measure the dense model and every single removal.
2. For several prices of an attn block in ffn blocks, follow a path of removals; each step
   measures only the few blocks that were cheapest when last measured.
3. In rounds: fit a predictor to all scores so far; find which pairs of counts requests would use;
   let the predictor improve the best known mask of each such pair by swaps within a kind and by
   steps from neighbouring pairs; measure the masks with the greatest expected gain.
4. Extend one path until no block is left, so that the table has an answer to every budget.

The search is deterministic given the scores, so an interrupted search is repeated from the store.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from rap_env.costs import request_costs
from rap_env.errors import InvalidRequestError
from rap_env.importance.frontier import Counts, Frontier, best_by_counts
from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.request import Request
from rap_env.scoring.interface import OnScore
from rap_env.scoring.predictor import Features, Floats, ScoreModel
from rap_env.scoring.predictor_fit import (
    PredictorFit,
    feature_matrix,
    fit_predictor,
    necessary_masks,
)
from rap_env.scoring.scorer import MaskScorer

_LEAST_RISE = 1e-4  # nats per token; removals that lower the NLL get this rise in prices
_CHOOSE_AGAIN = 1.5  # growth of the number of scores after which settings are chosen again
_STARTS = 3  # masks that are improved for each pair of counts
_SWAPS = 3  # successive swaps per mask: farther away, the predictor has no evidence
_TOP = 12  # best predicted masks that are searched for an unmeasured one

PRICES = (0.35, 0.7, 1.4, 2.8, np.inf)
"""Prices of an attn block in ffn blocks; one path is searched for each."""


@dataclass(frozen=True)
class FrontierConfig:
    """Settings of the search for a frontier.

    Attributes:
        evaluations: Most masks to score; two for each block are needed in any case.
        deepest_loss: Greatest delta_nll of interest, nats per token: the search ignores paths
            and pairs of counts beyond it.
        looks: Blocks that a path measures before it removes one.
        batch: Masks to measure between two fits of the predictor.
        slack: A pair of counts is useful to a request if its expected delta_nll exceeds that of
            the best pair by at most this share.
        seed: Decides which scores choose the predictor's settings.

    Raises:
        InvalidRequestError: A number is out of range.
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
    on_score: OnScore | None = None,
) -> Frontier:
    """Search the best masks on the scorer's text for the pairs of counts that requests would use.

    `requests` is a sample of the expected requests: their bytes decide which pairs matter.
    `on_score` is called after each scored mask.
    """
    began, ran = time.perf_counter(), scorer.evaluations
    search = _Search(scorer, config, on_score)
    search.paths()
    useful = UsefulCounts(MemoryModel(scorer.llm), requests)
    while search.left > 0 and search.round(useful):
        pass
    search.finish()
    return Frontier(
        num_blocks=search.blocks,
        dense_nll=search.dense_nll,
        scores=search.nll,
        evaluations_run=scorer.evaluations - ran,
        seconds=time.perf_counter() - began,
        settings={**asdict(config), "requests": len(requests)},
        provenance=scorer.provenance,
    )


class _Settings(NamedTuple):
    """Settings of the predictor, and the number of masks they were chosen with."""

    masks: int
    reach: int
    ridge: float


class _Search:
    def __init__(
        self,
        scorer: MaskScorer,
        config: FrontierConfig,
        on_score: OnScore | None,
    ) -> None:
        self._scorer, self._config, self._on_score = scorer, config, on_score
        self._settings: _Settings | None = None
        self.blocks = scorer.llm.facts.num_blocks
        self.nll: dict[Plan, float] = {}
        dense, *singles = necessary_masks(self.blocks)
        self.measure([dense, *singles])
        self.dense_nll = self.nll[dense]
        self.alone = np.array([self.delta_nll(mask) for mask in singles])

    @property
    def left(self) -> int:
        """Masks that may still be scored, before the last path."""
        return self._config.evaluations - self.blocks - len(self.nll)

    def delta_nll(self, mask: Plan) -> float:
        """Measured delta_nll, nats per token."""
        return self.nll[mask] - self.dense_nll

    def measure(self, masks: Sequence[Plan]) -> None:
        """Score masks."""
        found = self._scorer.nll_many(masks, self._on_score) if masks else []
        self.nll |= dict(zip(masks, found, strict=True))

    def paths(self) -> None:
        """Removals one after the other, cheapest first, for each price of an attn block."""
        for price in PRICES:
            self._path(price)

    def _path(self, price: float) -> None:
        bytes_freed = np.array([min(price, 1.0), min(1 / price, 1.0)])[np.arange(self.blocks) % 2]
        rise, mask = self.alone.copy(), Plan()

        def price_per_byte(index: int) -> float:
            return float(max(rise[index], _LEAST_RISE) / max(bytes_freed[index], 1e-9))

        while self.left > 0 and self.delta_nll(mask) <= self._config.deepest_loss:
            kept = sorted(set(range(self.blocks)) - mask.removed, key=price_per_byte)
            larger = {index: mask.without(index) for index in kept[: self._config.looks]}
            if not larger:
                break
            self.measure(list(larger.values()))
            for index, candidate in larger.items():
                rise[index] = self.delta_nll(candidate) - self.delta_nll(mask)
            mask = larger[min(larger, key=price_per_byte)]

    def finish(self) -> None:
        """Extend the mask with most removals in one-shot order until no block is left."""
        mask = max(self.nll, key=lambda m: (len(m.removed), -self.nll[m]))
        path = []
        for index in sorted(set(range(self.blocks)) - mask.removed, key=lambda i: self.alone[i]):
            mask = mask.without(index)
            path.append(mask)
        self.measure(path)

    def round(self, useful: UsefulCounts) -> bool:
        """Fit a predictor and measure its proposals; False if it has none."""
        predictor = self._fit()
        best = best_by_counts(self.nll)
        expected = self._expected(best)
        gains: dict[Plan, tuple[float, float]] = {}
        for pair in sorted(useful.pairs(expected, self._config.slack)):
            found = propose(pair, best, predictor, self.nll)
            if found is not None:
                mask, predicted = found
                gain = float(expected[pair]) - predicted
                gains[mask] = (
                    gain,
                    gain / (abs(float(expected[pair])) + predictor.members[0].offset),
                )
        chosen = _alternately(gains)
        self.measure(chosen[: min(self._config.batch, self.left)])
        return bool(chosen)

    def _fit(self) -> ScoreModel:
        """A predictor fitted to all scores; its settings are chosen again from time to time."""
        masks = list(self.nll)
        features = feature_matrix(masks, self.blocks)
        measured = np.array([self.delta_nll(mask) for mask in masks])
        chosen = self._settings
        if chosen is None or len(masks) > _CHOOSE_AGAIN * chosen.masks:
            predictor, _ = fit_predictor(features, measured, self.alone, seed=self._config.seed)
            self._settings = _Settings(len(masks), predictor.reach, predictor.ridge)
            return ScoreModel((predictor,))
        parts = [np.arange(len(masks))]
        fit = PredictorFit(features, measured, self.alone, parts, reaches=(chosen.reach,))
        return ScoreModel((fit.solved([0], chosen.reach, chosen.ridge),))

    def _expected(self, best: dict[Counts, Plan]) -> Floats:
        """delta_nll per pair of counts: of its best mask, or of a mask that removes more."""
        layers = self.blocks // 2
        table = np.full((layers + 1, layers + 1), np.inf)
        for pair, mask in best.items():
            table[pair] = self.delta_nll(mask)
        for axis in (0, 1):
            table = np.flip(np.minimum.accumulate(np.flip(table, axis), axis), axis)
        return np.where(table <= self._config.deepest_loss, table, np.inf)


def _alternately(gains: Mapping[Plan, tuple[float, float]]) -> list[Plan]:
    """Masks by gain in nats and by relative gain in turn, so that neither kind takes all."""
    orders = [sorted(gains, key=lambda mask: -gains[mask][kind]) for kind in (0, 1)]
    return list(dict.fromkeys(chain.from_iterable(zip(*orders, strict=True))))


class UsefulCounts:
    """The pairs of counts that requests would use, if blocks of a kind cost their mean bytes."""

    def __init__(self, memory: MemoryModel, requests: Sequence[Request]) -> None:
        layers = memory.facts.num_layers
        attn, ffn = np.meshgrid(np.arange(layers + 1), np.arange(layers + 1), indexing="ij")
        fitting = []
        for request in requests:
            costs = request_costs(memory, request.batch_size, request.seq_len_tokens)
            freed = np.array(costs.freed, dtype=np.float64)
            over = costs.dense_peak_bytes - request.budget_bytes
            fitting.append(attn * freed[::2].mean() + ffn * freed[1::2].mean() >= over)
        self._fitting = np.unique(np.array(fitting), axis=0)

    def pairs(self, expected: Floats, slack: float) -> set[Counts]:
        """Pairs whose expected delta_nll is close to that of the best pair of some request.

        `expected` is in nats per token, (L + 1, L + 1); `slack` is the greatest distance from the
        best pair, as a share.
        """
        found: set[Counts] = set()
        for fits in self._fitting:
            possible = np.where(fits, expected, np.inf)
            if np.isfinite(possible.min()):
                good = possible <= (1 + slack) * max(float(possible.min()), 0.0) + 1e-9
                found |= {(int(a), int(f)) for a, f in np.argwhere(good)}
        return found


def propose(
    pair: Counts,
    best: Mapping[Counts, Plan],
    predictor: ScoreModel,
    measured: Collection[Plan],
) -> tuple[Plan, float] | None:
    """The best predicted mask with these counts that was not measured, and its delta_nll.

    Masks are rows of the predictor's feature matrix here, because a round predicts all swaps of
    many masks: the 401 swaps of a mask of 20 among 60 blocks take 0.5 ms to make and predict as
    rows, and 2.0 ms as `Plan` objects.
    """
    blocks = len(predictor.members[0].alone)
    starts = feature_matrix(list(_starts(pair, best, blocks)), blocks)
    found: list[tuple[float, Plan]] = []
    for start in starts[np.argsort(predictor.delta_nll_many(starts, clamped=False))[:_STARTS]]:
        row = start
        for _ in range(_SWAPS):
            swaps = _swaps(row)
            predicted = predictor.delta_nll_many(swaps, clamped=False)
            order = np.argsort(predicted)
            found += _unmeasured(swaps[order[:_TOP]], predicted[order[:_TOP]], measured)
            row = swaps[order[0]]
    if not found:
        return None
    least, mask = min(found, key=lambda entry: entry[0])
    return mask, least


def _unmeasured(
    features: Features, predicted: Floats, measured: Collection[Plan]
) -> list[tuple[float, Plan]]:
    """The first of some masks that was not measured, with its predicted delta_nll; or nothing."""
    for row, delta_nll in zip(features, predicted, strict=True):
        mask = Plan.removing(*np.flatnonzero(row).tolist())
        if mask not in measured:
            return [(float(delta_nll), mask)]
    return []


def _starts(pair: Counts, best: Mapping[Counts, Plan], blocks: int) -> Iterator[Plan]:
    """The best known mask of the pair, and masks one step away from those of its neighbours."""
    attn, ffn = pair
    if pair in best:
        yield best[pair]
    for kind, fewer in ((0, (attn - 1, ffn)), (1, (attn, ffn - 1))):
        if fewer in best:
            for index in range(kind, blocks, 2):
                if index not in best[fewer].removed:
                    yield best[fewer].without(index)
    for kind, more in ((0, (attn + 1, ffn)), (1, (attn, ffn + 1))):
        if more in best:
            for index in sorted(best[more].removed):
                if index % 2 == kind:
                    yield Plan(best[more].removed - {index})


def _swaps(row: npt.NDArray[np.bool_]) -> Features:
    """The mask itself, and all masks with one removed block swapped for a kept one of its kind."""
    places = np.arange(len(row))
    out, into = np.nonzero(row[:, None] & ~row & (places[:, None] % 2 == places % 2))
    rows = np.repeat(row[None], len(out) + 1, axis=0)
    rows[np.arange(1, len(out) + 1), out] = False
    rows[np.arange(1, len(out) + 1), into] = True
    return rows
