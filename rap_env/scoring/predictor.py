"""Predicts delta_nll of plans from measured ones. Needs numpy only, no model.

The logarithm of delta_nll is fitted by ridge regression. The sum of the blocks' single
delta_nll sets its level: the values roughly add up, and saturate where the model only
guesses. One weight per block and one per pair of blocks model how blocks affect each other. A
plan also lowers items that it keeps. What their levels cost alone is added to that sum: they
cost little and interact little, so that no weights of their own are needed. On 377 plans of
the default model, the median relative error on held-out plans was 3 % with that, 3 to 4 %
with a weight for each level, and 12 % for the sum alone.

An ensemble of predictors is pessimistic where there is little evidence. A policy that is
trained on a single predictor finds the plans that the predictor has hardly seen and wrongly
rates as harmless. Members that were fitted to different samples of the measured plans agree
where there is evidence and disagree elsewhere, so a multiple of their standard deviation is
added to their mean (bootstraps as in Chua et al. 2018, arXiv 1805.12114; pessimism as in Yu
et al. 2020, MOPO, arXiv 2005.13239).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from rap_env.errors import UnknownNameError
from rap_env.plan import Plan

Features = npt.NDArray[np.bool_]
"""Input of the predictor: True for each removed block of each plan, (N, 2L)."""

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

Lowered = Callable[[Plan], float]
"""Gives the sum of what the levels of a plan cost alone, nats per token."""

LEAST_SHARE = 0.5
"""Lower bound of a plan's delta_nll, as a share of the delta_nll of its worst block alone. In
4,900 measured plans of the default model whose worst block alone exceeds 0.1 nats, the least
share was 0.67."""

SCALE = 256.0
"""Weights and activations of a correction network are whole numbers divided by this."""

_COUNT_SCALE = 20.0  # brings squared counts of blocks near the other inputs
_MOST_LOG = 50.0


@dataclass(frozen=True, eq=False)
class CorrectionNetwork:
    """Corrects the predicted log(delta_nll + offset) of a plan, from its removed blocks.

    Where tens of thousands of plans were measured, it learns what pairs of blocks do not
    explain. On 2,000 held-out plans of the default model, of 20,000 that random, searching
    and learning agents reach, the median relative error of the predictor alone was 6.3 %, 5.7
    % with weights for numbers and runs of blocks, and 3.9 % with this network. With a few
    thousand plans, the predictor alone is as good.

    It is a multilayer perceptron with rectified linear units, and without one at its output.
    Weights and activations are whole multiples of 1/256: sums are then exact in float64, so
    that predictions do not depend on the order of additions, thus neither on the machine nor
    on how many plans are predicted together.

    Attributes:
        weights: Weights of each layer times `SCALE`, (inputs, outputs); the first layer has
            2L inputs, the last one has one output.
        biases: Biases of each layer times `SCALE`, (outputs,).
    """

    weights: tuple[Sequence[Sequence[int]], ...]
    biases: tuple[Sequence[int], ...]

    def of_blocks(self, index: npt.NDArray[np.int64]) -> float:
        """The correction of the plan that removes these blocks."""
        first, *_ = self._layers
        return float(self._output(first[0][index].sum(axis=0) + first[1])[0])

    def of_many(self, features: npt.NDArray[np.bool_]) -> Floats:
        """The corrections of the rows of a feature matrix (N, 2L), as `of_blocks`, (N,)."""
        first, *_ = self._layers
        return np.asarray(self._output(features.astype(np.float64) @ first[0] + first[1])[:, 0])

    def _output(self, sums: Floats) -> Floats:
        """What the other layers make of the sums of the first one, (..., 1)."""
        for weights, biases in self._layers[1:]:
            products = np.maximum(sums, 0.0) @ weights
            sums = np.floor(products / SCALE + 0.5) + biases
        return sums / SCALE

    @cached_property
    def _layers(self) -> list[tuple[Floats, Floats]]:
        layers = zip(self.weights, self.biases, strict=True)
        return [(np.array(w, dtype=np.float64), np.array(b, dtype=np.float64)) for w, b in layers]


@dataclass(frozen=True, eq=False)
class DeltaNLLPredictor:
    """Predicts delta_nll in nats per token, deterministically and for each plan independently.

    With r the removed blocks, a and f the numbers of attention and feed-forward blocks among
    them, and s the sum of their single delta_nll and of what other lowered items cost alone:
    ``log(delta_nll + offset) = intercept + linear[r] + pairs[r, r] + shape . (log(s +
    offset), its square, a², f², a f) + correction(r)``.

    Predictions are clamped. A plan is never predicted to be better than the best measured
    plan with at least as many removals, nor better than `LEAST_SHARE` of the delta_nll of its
    worst block alone, so that an agent gains nothing by finding errors of the predictor. It
    is never predicted to be worse than the worst measured plan. Where few plans were measured
    (many removals), predictions are hardly more precise than these bounds.

    Attributes:
        alone: delta_nll without each block alone, nats per token, (2L,).
        offset: Resolution of the fit: values far below it are not distinguished, nats per
            token.
        reach: Greatest distance of a pair that has a weight, in blocks.
        ridge: The penalty it was fitted with.
        intercept: As above.
        linear: Weight of each block, (2L,).
        pairs: Weight of each pair within reach, in the order of `pair_indices`.
        shape: Weights of the five terms above.
        least: Least delta_nll measured with at least 0 ... 2L removals, nats per token, (2L +
            1,).
        most: Greatest delta_nll measured, nats per token.
        correction: Corrects the sum of the other terms; None if there were too few plans to
            fit it.
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
    correction: CorrectionNetwork | None = None

    def delta_nll(self, plan: Plan, lowered: float = 0.0) -> float:
        """The predicted delta_nll of a plan, nats per token.

        Args:
            plan: The plan, of which only the removed blocks are read.
            lowered: What the other lowered items cost alone, nats per token, at least 0.
        """
        if not plan and lowered <= 0:
            return 0.0
        # Ascending: sums of floats depend on their order.
        index = np.array(sorted(plan.removed), dtype=np.int64)
        alone = self._alone[index]
        ffn = int((index % 2).sum())
        alone_costs = float(np.maximum(alone, 0).sum()) + lowered
        terms = shape_terms(alone_costs, len(index) - ffn, ffn, self.offset)
        log_delta = self.intercept + float(self._linear[index].sum())
        log_delta += float(self._pairs[index[:, None], index].sum())
        log_delta += sum(w * float(term) for w, term in zip(self.shape, terms, strict=True))
        if self.correction is not None:
            log_delta += self.correction.of_blocks(index)
        least = max(self.least[len(index)], LEAST_SHARE * float(alone.max(initial=-np.inf)))
        return min(max(math.exp(min(log_delta, _MOST_LOG)) - self.offset, least), self.most)

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


@dataclass(frozen=True, eq=False)
class ScoreModel:
    """Predicts delta_nll of plans in nats per token, pessimistically.

    Attributes:
        members: E predictors, each fitted to another sample of the measured plans; `alone`
            and `offset` are the same in all.
        pessimism: Standard deviations between members that are added to their mean.
    """

    members: tuple[DeltaNLLPredictor, ...]
    pessimism: float = 0.0

    def delta_nll(self, plan: Plan, lowered: float = 0.0) -> float:
        """Mean plus `pessimism` times the standard deviation of the members, nats per token."""
        if len(self.members) == 1:
            return self.members[0].delta_nll(plan, lowered)
        predicted = [member.delta_nll(plan, lowered) for member in self.members]
        return float(np.mean(predicted) + self.pessimism * np.std(predicted))

    def delta_nll_many(
        self, features: Features, lowered: Floats | float = 0.0, *, clamped: bool = True
    ) -> Floats:
        """As `delta_nll`, for the rows of a feature matrix (N, 2L); nats per token, (N,).

        They equal those of `delta_nll` up to rounding. `lowered` is as there, for all or for
        each, (N,). Without `clamped`, the bounds of `DeltaNLLPredictor` are left out: a
        search that measures what it proposes needs to tell plans apart beyond the bounds too.
        """
        mean, spread = self.mean_and_spread(features, lowered, clamped=clamped)
        return mean + self.pessimism * spread

    def mean_and_spread(
        self, features: Features, lowered: Floats | float = 0.0, *, clamped: bool = True
    ) -> tuple[Floats, Floats]:
        """Mean and standard deviation of the members' predictions, nats per token, (N,) each."""
        rows = np.arange(len(features))
        predicted = self._predicted(features, rows, np.full(len(rows), -1), lowered, clamped)
        return predicted.mean(axis=0), predicted.std(axis=0)

    def delta_nll_below(
        self, features: Features, parents: Indices, removed: Indices, lowered: Floats
    ) -> Floats:
        """As `delta_nll_many` without bounds, for plans that remove at most one block more.

        The products of pairs are made for the others alone.

        Args:
            features: Plans, (M, 2L).
            parents: The row of the one that each plan to predict differs from, (N,).
            removed: The block that it removes beyond that, -1 for none, (N,).
            lowered: What its other lowered items cost alone, nats per token, (N,).
        """
        predicted = self._predicted(features, parents, removed, lowered, clamped=False)
        return np.asarray(predicted.mean(axis=0) + self.pessimism * predicted.std(axis=0))

    def _predicted(
        self,
        features: Features,
        parents: Indices,
        removed: Indices,
        lowered: Floats | float,
        clamped: bool,
    ) -> Floats:
        """Each member's prediction for the plans of `delta_nll_below`, nats per token, (E, N)."""
        more = removed >= 0
        rows, blocks = parents[more], removed[more]
        counts = features.sum(axis=1)[parents] + more
        ffn = features[:, 1::2].sum(axis=1)[parents] + (more & (removed % 2 == 1))
        x, offset = features.astype(np.float64), self.members[0].offset
        with_each = (x @ self._pairs).reshape(len(x), len(self.members), x.shape[1])
        of_pairs = np.einsum("neb,nb->ne", with_each, x) / 2
        logs = (self._intercept + x @ self._linear + of_pairs)[parents]
        logs[more] += self._linear[blocks] + with_each[rows, :, blocks]
        corrections = [member.correction for member in self.members]
        if clamped or any(corrections):
            plans = features[parents]
            plans[more, blocks] = True
        for column, correction in zip(logs.T, corrections, strict=True):
            if correction is not None:
                column += correction.of_many(plans)
        alone_costs = (x @ self._positive)[parents] + lowered
        alone_costs[more] += self._positive[blocks]
        terms = np.stack(shape_terms(alone_costs, counts - ffn, ffn, offset), axis=1)
        predicted = np.exp(np.minimum(logs + terms @ self._shape, _MOST_LOG)) - offset
        if clamped:
            worst = np.where(plans, self._alone, -np.inf).max(axis=1, initial=-np.inf)
            least = np.maximum(self._least[counts], LEAST_SHARE * worst[:, None])
            predicted = np.minimum(np.maximum(predicted, least), self._most)
        return np.where((counts > 0) | (np.asarray(lowered) > 0), predicted.T, 0.0)

    # The weights of all members side by side, so that one product serves all of them.

    @cached_property
    def _alone(self) -> Floats:
        return np.array(self.members[0].alone)

    @cached_property
    def _positive(self) -> Floats:
        return np.maximum(self._alone, 0)

    @cached_property
    def _intercept(self) -> Floats:
        return np.array([member.intercept for member in self.members])

    @cached_property
    def _linear(self) -> Floats:
        return np.array([member.linear for member in self.members]).T

    @cached_property
    def _pairs(self) -> Floats:
        """Symmetric matrices side by side, (2L, E x 2L)."""
        return np.hstack([member._pairs + member._pairs.T for member in self.members])

    @cached_property
    def _shape(self) -> Floats:
        return np.array([member.shape for member in self.members]).T

    @cached_property
    def _least(self) -> Floats:
        return np.array([member.least for member in self.members]).T

    @cached_property
    def _most(self) -> Floats:
        return np.array([member.most for member in self.members])


def pair_indices(num_blocks: int, reach: int) -> tuple[Indices, Indices]:
    """Indices of the first and of the second block of every pair at most `reach` apart."""
    rows, columns = np.triu_indices(num_blocks, 1)
    near = columns - rows <= reach
    return rows[near], columns[near]


def shape_terms(alone_costs: Any, attn: Any, ffn: Any, offset: float) -> tuple[Any, ...]:
    """Five summary terms of a plan, as numbers (or arrays) of about the same size."""
    level = np.log(alone_costs + offset)
    counts = (attn * attn / _COUNT_SCALE, ffn * ffn / _COUNT_SCALE, attn * ffn / _COUNT_SCALE)
    return (level, 0.3 * level * level, *counts)


def lowered_cost(plan: Plan, lowered: Lowered | None) -> float:
    """What the levels of a plan other than removal cost alone, nats per token.

    Raises:
        UnknownNameError: There are such levels, and `lowered` is None.
    """
    kept = replace(plan, removed=frozenset())
    if not kept:
        return 0.0
    if lowered is None:
        item, level = next(iter(kept.levels.items()))
        hint = "Without costs of levels, only removals are predicted; use a live model."
        raise UnknownNameError("level", f"{level} ({item})", ["native", "removed"], hint)
    return max(0.0, lowered(kept))
