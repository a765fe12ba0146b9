"""Fits the predictors of `rap_env.scoring.predictor` to measured plans.

Numpy only.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from rap_env.plan import Plan
from rap_env.scoring.fidelity import Fidelity
from rap_env.scoring.predictor import (
    DeltaNLLPredictor,
    Features,
    Floats,
    Lowered,
    ScoreModel,
    lowered_cost,
    pair_indices,
    shape_terms,
)

REACHES = (4, 12, 60)
"""Candidates for the greatest distance, in blocks, of pairs that have a weight."""

RIDGES = (0.3, 1.0, 3.0, 10.0)
"""Candidates for the penalty on the squared weights."""

_CHUNK = 2048
_EVIDENCE = 20  # plans that a bound for their number of removals must rest on
_MOST_PAIRS = 2000  # deep models have more; more distant pairs are left out
_SPLIT = (0.8, 0.1, 0.1)  # plans to fit, to choose the settings, to state the fidelity


def fit_score_model(
    features: Features,
    delta_nll: Floats,
    alone: Floats,
    lowered: Floats | None = None,
    *,
    members: int = 1,
    pessimism: float = 0.0,
    seed: int = 0,
) -> tuple[ScoreModel, Fidelity]:
    """Fit predictors to measured plans and evaluate one on held-out plans.

    A tenth of the plans is held out for the evaluation; another tenth selects reach and
    ridge. A single member is then fitted to all plans, so it is no worse than the evaluated
    one; several are fitted to bootstrap samples, with the same settings.

    Args:
        features: The measured plans, from `feature_matrix`, (N, 2L).
        delta_nll: Their measured values, nats per token, (N,).
        alone: delta_nll without each block alone, nats per token, (2L,).
        lowered: What the other lowered items of each plan cost alone, nats per token, (N,);
            None if there are none.
        members: Predictors of the ensemble.
        pessimism: As in `ScoreModel`.
        seed: Decides which plans are held out, and the samples.

    Returns:
        The ensemble, and the fidelity of a predictor that never saw the held-out plans.
    """
    order = np.random.default_rng(seed).permutation(len(delta_nll))
    ends = np.round(np.cumsum(_SPLIT[:2]) * len(delta_nll)).astype(int)
    to_fit, to_choose, held_out = np.split(order, ends)
    fit = PredictorFit(features, delta_nll, alone, [to_fit, to_choose, held_out], lowered)
    candidates = [(reach, ridge) for reach in fit.reaches for ridge in RIDGES]
    best = min(candidates, key=lambda c: fit.error(fit.solved([0], *c), to_choose))
    evaluated = ScoreModel((fit.solved([0, 1], *best),))
    fidelity = Fidelity.of(
        evaluated.delta_nll_many(features[held_out], fit.lowered[held_out]),
        delta_nll[held_out],
        features[held_out].sum(axis=1),
        features.shape[1],
        fitted=len(to_fit) + len(to_choose),
    )
    if members == 1:
        return ScoreModel((fit.solved([0, 1, 2], *best),), pessimism), fidelity
    rng = np.random.default_rng([seed, members])
    samples = [rng.integers(len(delta_nll), size=len(delta_nll)) for _ in range(members)]
    fits = (PredictorFit(features, delta_nll, alone, [s], lowered, best[:1]) for s in samples)
    return ScoreModel(tuple(each.solved([0], *best) for each in fits), pessimism), fidelity


class PredictorFit:
    """Normal equations of parts of the data, from which predictors of any settings are solved.

    The data are as in `fit_score_model`; each part has the indices of its plans. Of the
    candidates for the reach, those with too many pairs are left out.
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
        features, lowered = self.features[part], self.lowered[part]
        predicted = ScoreModel((predictor,)).delta_nll_many(features, lowered)
        logs = np.log(np.maximum(predicted, -self.offset / 2) + self.offset)
        return float(np.sqrt(np.mean((logs - self.targets[part]) ** 2)))

    def _moments(self, part: npt.NDArray[np.int64]) -> Floats:
        """Products of all inputs (blocks, pairs, shape, 1) and the target, summed over plans."""
        rows, columns = self._pairs
        width = len(self.alone) + len(rows) + 7
        total = np.zeros((width, width))
        for start in range(0, len(part), _CHUNK):
            chosen = part[start : start + _CHUNK]
            x = self.features[chosen].astype(np.float64)
            alone_costs = x @ np.maximum(self.alone, 0) + self.lowered[chosen]
            shape = shape_terms(
                alone_costs, x[:, ::2].sum(axis=1), x[:, 1::2].sum(axis=1), self.offset
            )
            ones, target = np.ones(len(x)), self.targets[chosen]
            table = np.column_stack([x, x[:, rows] * x[:, columns], *shape, ones, target])
            total += table.T @ table
        return total


def fit_scores(
    scores: Mapping[Plan, float],
    num_blocks: int,
    lowered: Lowered | None = None,
    **settings: Any,
) -> tuple[ScoreModel, Fidelity]:
    """`fit_score_model` on measured plans.

    Args:
        scores: NLL of plans, nats per token, with those of `necessary_plans`.
        num_blocks: 2L.
        lowered: What the levels of a plan cost alone; None if the plans lower nothing else.
        **settings: Those of `fit_score_model`.

    Raises:
        UnknownNameError: A plan lowers an item that it keeps, and `lowered` is None.
    """
    plans, (native, *singles) = list(scores), necessary_plans(num_blocks)
    return fit_score_model(
        feature_matrix(plans, num_blocks),
        np.array([scores[plan] for plan in plans]) - scores[native],
        np.array([scores[plan] for plan in singles]) - scores[native],
        lowered_costs(plans, lowered),
        **settings,
    )


def necessary_plans(num_blocks: int) -> list[Plan]:
    """The plans that every fit needs: the native one, and every single removal."""
    return [Plan(), *(Plan.removing(index) for index in range(num_blocks))]


def feature_matrix(plans: Collection[Plan], num_blocks: int) -> Features:
    """The predictor's input: True for each removed block of each plan, (N, 2L)."""
    features = np.zeros((len(plans), num_blocks), dtype=bool)
    for row, plan in zip(features, plans, strict=True):
        row[list(plan.removed)] = True
    return features


def lowered_costs(plans: Collection[Plan], lowered: Lowered | None) -> Floats:
    """The predictor's second input: what levels other than removal cost alone, (N,)."""
    return np.array([lowered_cost(plan, lowered) for plan in plans])


def _least_by_count(
    counts: npt.NDArray[np.int64], delta_nll: Floats, blocks: int
) -> tuple[float, ...]:
    """For 0 ... 2L removals: the least delta_nll of a plan with at least so many removals.

    If fewer than `_EVIDENCE` plans have so many removals, the greatest number that at least
    `_EVIDENCE` plans have decides.
    """
    deepest = np.sort(counts)[-min(_EVIDENCE, len(counts))]
    least = np.full(blocks + 1, np.inf)
    np.minimum.at(least, np.minimum(counts, deepest), delta_nll)
    least[deepest:] = least[deepest]
    return tuple(np.minimum.accumulate(least[::-1])[::-1].tolist())
