"""Predicts delta_nll of masks and plans from measured ones. Needs numpy only, no model.

The logarithm of delta_nll is fitted by ridge regression. The sum of the blocks' single delta_nll
sets its level: the values roughly add up, and saturate where the model only guesses. One weight
per block and one per pair of blocks model how blocks affect each other. A plan also lowers items
that it keeps. What their levels cost alone is added to that sum: they cost little and interact
little, so that no weights of their own are needed. On 377 plans of the default model, the median
relative error on held-out plans was 3 % with that, 3 to 4 % with a weight for each level, and 12 %
for the sum alone.

An ensemble of predictors is pessimistic where there is little evidence. A policy that is trained
on a single predictor finds the masks that the predictor has hardly seen and wrongly rates as
harmless. Members that were fitted to different samples of the measured masks agree where there is
evidence and disagree elsewhere, so a multiple of their standard deviation is added to their mean
(bootstraps as in Chua et al. 2018, arXiv 1805.12114; pessimism as in Yu et al. 2020, MOPO, arXiv
2005.13239).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from rap_env.blocks import BlockMask
from rap_env.plan import CompressionPlan, MaskOrPlan, as_plan
from rap_env.scoring.fidelity import Fidelity

Features = npt.NDArray[np.bool_]
"""Input of the predictor: True for each removed block of each mask or plan, (N, 2L)."""

Floats = npt.NDArray[np.float64]

Lowered = Callable[[CompressionPlan], float]
"""Gives the sum of what the levels of a plan cost alone, nats per token."""

MEMBERS = 5
"""Default number of predictors in an ensemble."""

REACHES = (4, 12, 60)
"""Candidates for the greatest distance, in blocks, of pairs that have a weight."""

RIDGES = (0.3, 1.0, 3.0, 10.0)
"""Candidates for the penalty on the squared weights."""

LEAST_SHARE = 0.5
"""Lower bound of a mask's delta_nll, as a share of the delta_nll of its worst block alone. In
4,900 measured masks of the default model whose worst block alone exceeds 0.1 nats, the least
share was 0.67."""

_CHUNK = 2048
_EVIDENCE = 20  # masks that a bound for their number of removals must rest on
_MOST_PAIRS = 2000  # deep models have more; more distant pairs are left out
_COUNT_SCALE = 20.0  # brings squared counts of blocks near the other inputs
_SPLIT = (0.8, 0.1, 0.1)  # masks to fit, to choose the settings, to state the fidelity
_MOST_LOG = 50.0


@dataclass(frozen=True, eq=False)
class DeltaNLLPredictor:
    """Predicts delta_nll in nats per token, deterministically and for each mask independently.

    With r the removed blocks, a and f the numbers of attention and feed-forward blocks among
    them, and s the sum of their single delta_nll and of what other lowered items cost alone:
    ``log(delta_nll + offset) = intercept + linear[r] + pairs[r, r] + shape . (log(s + offset), its
    square, a², f², a f)``.

    Predictions are clamped. A mask is never predicted to be better than the best measured mask
    with at least as many removals, nor better than `LEAST_SHARE` of the delta_nll of its worst
    block alone, so that an agent gains nothing by finding errors of the predictor. It is never
    predicted to be worse than the worst measured mask. Where few masks were measured (many
    removals), predictions are hardly more precise than these bounds.

    Attributes:
        alone: delta_nll without each block alone, nats per token, (2L,).
        offset: Resolution of the fit: values far below it are not distinguished, nats per token.
        reach: Greatest distance of a pair that has a weight, in blocks.
        ridge: The penalty it was fitted with.
        intercept: As above.
        linear: Weight of each block, (2L,).
        pairs: Weight of each pair within reach, in the order of `pair_indices`.
        shape: Weights of the five terms above.
        least: Least delta_nll measured with at least 0 ... 2L removals, nats per token, (2L + 1,).
        most: Greatest delta_nll measured, nats per token.
    """

    alone: tuple[float, ...]
    offset: float
    reach: int
    ridge: float
    intercept: float
    linear: tuple[float, ...]
    pairs: tuple[float, ...]
    shape: tuple[float, ...]
    least: tuple[float, ...]
    most: float

    def delta_nll(self, mask: BlockMask, lowered: float = 0.0) -> float:
        """The predicted delta_nll of a mask or plan, nats per token.

        Args:
            mask: The removed blocks.
            lowered: What the other lowered items cost alone, nats per token, at least 0.
        """
        if not mask and lowered <= 0:
            return 0.0
        # Ascending: sums of floats depend on their order.
        index = np.array(list(mask), dtype=np.int64)
        alone = self._alone[index]
        ffn = int((index % 2).sum())
        together = float(np.maximum(alone, 0).sum()) + lowered
        terms = _shape(together, len(index) - ffn, ffn, self.offset)
        log_delta = self.intercept + float(self._linear[index].sum())
        log_delta += float(self._pairs[index[:, None], index].sum())
        log_delta += sum(w * float(term) for w, term in zip(self.shape, terms, strict=True))
        least = max(self.least[len(index)], LEAST_SHARE * float(alone.max(initial=-np.inf)))
        return min(max(math.exp(min(log_delta, _MOST_LOG)) - self.offset, least), self.most)

    def delta_nll_many(
        self, features: Features, lowered: Floats | float = 0.0, *, clamped: bool = True
    ) -> Floats:
        """The predicted delta_nll of many masks or plans, nats per token, (N,).

        They equal those of `delta_nll` up to rounding. `lowered` is as there, for all or for each,
        (N,). Without `clamped`, the bounds described above are left out: a search that measures
        what it proposes needs to tell masks apart beyond the bounds too.
        """
        x = features.astype(np.float64)
        counts, ffn = features.sum(axis=1), x[:, 1::2].sum(axis=1)
        together = x @ np.maximum(self._alone, 0) + lowered
        terms = _shape(together, counts - ffn, ffn, self.offset)
        log_delta = self.intercept + x @ self._linear + ((x @ self._pairs) * x).sum(axis=1)
        log_delta += sum(weight * term for weight, term in zip(self.shape, terms, strict=True))
        found = np.exp(np.minimum(log_delta, _MOST_LOG)) - self.offset
        changed = (counts > 0) | (np.asarray(lowered) > 0)
        if not clamped:
            return np.where(changed, found, 0.0)
        worst = np.where(features, self._alone, -np.inf).max(axis=1, initial=-np.inf)
        least = np.maximum(np.array(self.least)[counts], LEAST_SHARE * worst)
        return np.where(changed, np.minimum(np.maximum(found, least), self.most), 0.0)

    @cached_property
    def _alone(self) -> Floats:
        return np.array(self.alone)

    @cached_property
    def _linear(self) -> Floats:
        return np.array(self.linear)

    @cached_property
    def _pairs(self) -> Floats:
        """Weights of pairs as a matrix, each pair once, (2L, 2L)."""
        matrix = np.zeros((len(self.alone), len(self.alone)))
        matrix[pair_indices(len(self.alone), self.reach)] = self.pairs
        return matrix


def fit_predictor(
    features: Features,
    delta_nll: Floats,
    alone: Floats,
    lowered: Floats | None = None,
    *,
    seed: int = 0,
) -> tuple[DeltaNLLPredictor, Fidelity]:
    """Fit a predictor to measured masks and evaluate it on held-out masks.

    A tenth of the masks is held out for the evaluation; another tenth selects reach and ridge. The
    returned predictor is then fitted to all masks, so it is no worse than the evaluated one.

    Args:
        features: The measured masks, from `feature_matrix`, (N, 2L).
        delta_nll: Their measured values, nats per token, (N,).
        alone: delta_nll without each block alone, nats per token, (2L,).
        lowered: What the other lowered items of each plan cost alone, nats per token, (N,); None
            for masks.
        seed: Decides which masks are held out.

    Returns:
        The predictor, and the fidelity of one that never saw the held-out masks.
    """
    order = np.random.default_rng(seed).permutation(len(delta_nll))
    ends = np.round(np.cumsum(_SPLIT[:2]) * len(delta_nll)).astype(int)
    to_fit, to_choose, held_out = np.split(order, ends)
    fit = PredictorFit(features, delta_nll, alone, [to_fit, to_choose, held_out], lowered)
    candidates = [(reach, ridge) for reach in fit.reaches for ridge in RIDGES]
    best = min(candidates, key=lambda c: fit.error(fit.solved([0], *c), to_choose))
    evaluated = fit.solved([0, 1], *best)
    fidelity = Fidelity.of(
        evaluated.delta_nll_many(features[held_out], fit.lowered[held_out]), delta_nll[held_out],
        features[held_out].sum(axis=1), features.shape[1], fitted=len(to_fit) + len(to_choose),
    )  # fmt: skip
    return fit.solved([0, 1, 2], *best), fidelity


class PredictorFit:
    """Normal equations of parts of the data, from which predictors of any settings are solved.

    The data are as in `fit_predictor`; each part has the indices of its masks. Of the candidates
    for the reach, those with too many pairs are left out.
    """

    def __init__(
        self,
        features: Features,
        delta_nll: Floats,
        alone: Floats,
        parts: list[npt.NDArray[np.int64]],
        lowered: Floats | None = None,
        reaches: Sequence[int] = REACHES,
    ) -> None:
        self.features, self.delta_nll, self.alone, self.parts = features, delta_nll, alone, parts
        self.lowered = np.zeros(len(delta_nll)) if lowered is None else lowered
        self.offset = max(1e-6, float(np.median(np.abs(alone))) / 2)
        self.targets = np.log(np.maximum(delta_nll, -self.offset / 2) + self.offset)
        sizes = {reach: len(pair_indices(len(alone), reach)[0]) for reach in reaches}
        self.reaches = [r for r in reaches if sizes[r] <= _MOST_PAIRS] or [min(reaches)]
        self._pairs = pair_indices(len(alone), self.reaches[-1])
        self._sums = [self._moments(part) for part in parts]

    def solved(self, parts: list[int], reach: int, ridge: float) -> DeltaNLLPredictor:
        """The predictor fitted to some of the parts."""
        blocks = len(self.alone)
        pairs = np.flatnonzero(self._pairs[1] - self._pairs[0] <= reach)
        width = len(self._sums[0])
        used = np.concatenate([np.arange(blocks), blocks + pairs, np.arange(width - 7, width - 1)])
        sums = sum(self._sums[part] for part in parts)
        assert isinstance(sums, np.ndarray)
        penalty = np.full(len(used), ridge)
        penalty[-1] = 1e-9  # the intercept is free
        weights = np.linalg.solve(sums[np.ix_(used, used)] + np.diag(penalty), sums[used, -1])
        seen = np.concatenate([self.parts[part] for part in parts])
        return DeltaNLLPredictor(
            alone=tuple(self.alone.tolist()),
            offset=self.offset,
            reach=reach,
            ridge=ridge,
            intercept=float(weights[-1]),
            linear=tuple(weights[:blocks].tolist()),
            pairs=tuple(weights[blocks:-6].tolist()),
            shape=tuple(weights[-6:-1].tolist()),
            least=_least_by_count(self.features[seen].sum(axis=1), self.delta_nll[seen], blocks),
            most=float(max(self.delta_nll[seen].max(), self.alone.max())),
        )

    def error(self, predictor: DeltaNLLPredictor, part: npt.NDArray[np.int64]) -> float:
        """Root mean squared error of log(delta_nll + offset)."""
        found = predictor.delta_nll_many(self.features[part], self.lowered[part])
        logs = np.log(np.maximum(found, -self.offset / 2) + self.offset)
        return float(np.sqrt(np.mean((logs - self.targets[part]) ** 2)))

    def _moments(self, part: npt.NDArray[np.int64]) -> Floats:
        """Products of all inputs (blocks, pairs, shape, 1) and the target, summed over masks."""
        rows, columns = self._pairs
        width = len(self.alone) + len(rows) + 7
        total = np.zeros((width, width))
        for start in range(0, len(part), _CHUNK):
            chosen = part[start : start + _CHUNK]
            x = self.features[chosen].astype(np.float64)
            together = x @ np.maximum(self.alone, 0) + self.lowered[chosen]
            shape = _shape(together, x[:, ::2].sum(axis=1), x[:, 1::2].sum(axis=1), self.offset)
            ones, target = np.ones(len(x)), self.targets[chosen]
            table = np.column_stack([x, x[:, rows] * x[:, columns], *shape, ones, target])
            total += table.T @ table
        return total


@dataclass(frozen=True, eq=False)
class ScoreModel:
    """Predicts delta_nll of masks and plans in nats per token, pessimistically.

    Attributes:
        members: Predictors, each fitted to another sample of the measured masks.
        pessimism: Standard deviations between members that are added to their mean.
    """

    members: tuple[DeltaNLLPredictor, ...]
    pessimism: float = 0.0

    def delta_nll(self, mask: BlockMask, lowered: float = 0.0) -> float:
        """Mean plus `pessimism` times the standard deviation of the members, nats per token."""
        if len(self.members) == 1:
            return self.members[0].delta_nll(mask, lowered)
        found = [member.delta_nll(mask, lowered) for member in self.members]
        return float(np.mean(found) + self.pessimism * np.std(found))

    def delta_nll_many(self, features: Features, lowered: Floats | float = 0.0) -> Floats:
        """As `delta_nll`, for the rows of a feature matrix (N, 2L); nats per token, (N,)."""
        mean, spread = self.mean_and_spread(features, lowered)
        return mean + self.pessimism * spread

    def mean_and_spread(
        self, features: Features, lowered: Floats | float = 0.0, *, clamped: bool = True
    ) -> tuple[Floats, Floats]:
        """Mean and standard deviation of the members' predictions, nats per token, (N,) each."""
        found = np.array(
            [member.delta_nll_many(features, lowered, clamped=clamped) for member in self.members]
        )
        return found.mean(axis=0), found.std(axis=0)


def fit_score_model(
    features: Features,
    delta_nll: Floats,
    alone: Floats,
    lowered: Floats | None = None,
    *,
    members: int = MEMBERS,
    pessimism: float = 0.0,
    seed: int = 0,
) -> tuple[ScoreModel, Fidelity]:
    """Fit an ensemble to measured masks, given as to `fit_predictor`, and evaluate one member.

    A single member is fitted to all masks, several to bootstrap samples. `seed` decides which
    masks are held out, and the samples.

    Returns:
        The ensemble, and the fidelity of a single predictor that never saw the held-out masks;
        all members use the settings that were best for it.
    """
    single, fidelity = fit_predictor(features, delta_nll, alone, lowered, seed=seed)
    if members == 1:
        return ScoreModel((single,), pessimism), fidelity
    rng = np.random.default_rng([seed, members])
    samples = [rng.integers(len(delta_nll), size=len(delta_nll)) for _ in range(members)]
    found = []
    for sample in samples:
        fit = PredictorFit(features, delta_nll, alone, [sample], lowered, (single.reach,))
        found.append(fit.solved([0], single.reach, single.ridge))
    return ScoreModel(tuple(found), pessimism), fidelity


def fit_scores(
    scores: Mapping[MaskOrPlan, float],
    num_blocks: int,
    lowered: Lowered | None = None,
    *,
    members: int = MEMBERS,
    pessimism: float = 0.0,
    seed: int = 0,
) -> tuple[ScoreModel, Fidelity]:
    """`fit_score_model` on measured masks and plans.

    Args:
        scores: NLL of masks and plans, nats per token, with those of `necessary_masks`.
        num_blocks: 2L.
        lowered: What the levels of a plan cost alone; None if there are masks only.
        members: As in `fit_score_model`.
        pessimism: As in `ScoreModel`.
        seed: As in `fit_score_model`.
    """
    plans, (dense, *singles) = list(scores), necessary_masks(num_blocks)
    return fit_score_model(
        feature_matrix(plans, num_blocks),
        np.array([scores[plan] for plan in plans]) - scores[dense],
        np.array([scores[mask] for mask in singles]) - scores[dense],
        None if lowered is None else lowered_costs(plans, lowered),
        members=members,
        pessimism=pessimism,
        seed=seed,
    )


def necessary_masks(num_blocks: int) -> list[BlockMask]:
    """The masks that every fit needs: the dense model's, and every single removal."""
    return [BlockMask(), *(BlockMask.of(index) for index in range(num_blocks))]


def feature_matrix(plans: Collection[MaskOrPlan], num_blocks: int) -> Features:
    """The predictor's input: True for each removed block of each mask or plan, (N, 2L)."""
    features = np.zeros((len(plans), num_blocks), dtype=bool)
    for row, plan in zip(features, plans, strict=True):
        row[list(as_plan(plan).removed.indices)] = True
    return features


def lowered_costs(plans: Collection[MaskOrPlan], lowered: Lowered) -> Floats:
    """The predictor's second input: what levels other than removal cost alone, (N,)."""
    return np.array([lowered_cost(plan, lowered) for plan in plans])


def lowered_cost(plan: MaskOrPlan, lowered: Lowered) -> float:
    """What the levels of a mask or plan other than removal cost alone, nats per token."""
    kept = replace(as_plan(plan), removed=BlockMask())
    return max(0.0, lowered(kept)) if kept else 0.0


def pair_indices(
    num_blocks: int, reach: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Indices of the first and of the second block of every pair at most `reach` apart."""
    rows, columns = np.triu_indices(num_blocks, 1)
    near = columns - rows <= reach
    return rows[near], columns[near]


def _shape(together: Any, attn: Any, ffn: Any, offset: float) -> tuple[Any, ...]:
    """Five summary terms of a mask, as numbers (or arrays) of about the same size."""
    level = np.log(together + offset)
    counts = (attn * attn / _COUNT_SCALE, ffn * ffn / _COUNT_SCALE, attn * ffn / _COUNT_SCALE)
    return (level, 0.3 * level * level, *counts)


def _least_by_count(
    counts: npt.NDArray[np.int64], delta_nll: Floats, blocks: int
) -> tuple[float, ...]:
    """For 0 ... 2L removals: the least delta_nll of a mask with at least so many removals.

    If fewer than `_EVIDENCE` masks have so many removals, the greatest number that at least
    `_EVIDENCE` masks have decides.
    """
    deepest = np.sort(counts)[-min(_EVIDENCE, len(counts))]
    least = np.full(blocks + 1, np.inf)
    np.minimum.at(least, np.minimum(counts, deepest), delta_nll)
    least[deepest:] = least[deepest]
    return tuple(np.minimum.accumulate(least[::-1])[::-1].tolist())
