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

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from rap_env.errors import UnknownNameError
from rap_env.ladder.items import Counts, Ladder
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
_HIGH, _LOW = 2.0**24, 2.0**60


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

    def of_many(self, features: npt.NDArray[np.bool_]) -> Floats:
        """The corrections of the plans of a feature matrix (N, 2L), (N,)."""
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
        """As `delta_nll_many`, for one plan."""
        features = np.zeros((1, len(self._alone)), dtype=bool)
        features[0, list(plan.removed)] = True
        return float(self.delta_nll_many(features, lowered)[0])

    def delta_nll_many(
        self, features: Features, lowered: Floats | float = 0.0, *, clamped: bool = True
    ) -> Floats:
        """Mean plus `pessimism` times the standard deviation of the members, nats per token.

        Args:
            features: The removed blocks of plans, (N, 2L).
            lowered: What their other lowered items cost alone, nats per token, at least 0; for
                all or for each, (N,).
            clamped: Whether the bounds of `DeltaNLLPredictor` hold. A search that measures what
                it proposes needs to tell plans apart beyond the bounds too.

        Returns:
            (N,); that of a plan does not depend on the others.
        """
        return self.bound(self.of_members(features, lowered, clamped=clamped))

    def of_members(
        self, features: Features, lowered: Floats | float = 0.0, *, clamped: bool = True
    ) -> Floats:
        """The predictions of each member, nats per token, (N, E)."""
        return self._predicted(self._sums(features), features, lowered, clamped=clamped)

    def bound(self, predicted: Floats) -> Floats:
        """What `delta_nll_many` makes of the members' predictions (N, E), (N,)."""
        if len(self.members) == 1:
            return predicted[:, 0]
        return np.asarray(predicted.mean(axis=1) + self.pessimism * predicted.std(axis=1))

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
        more = removed >= 0
        rows, blocks = parents[more], removed[more]
        of_blocks, of_pairs, products = self._sums(features)
        of_blocks, of_pairs, plans = of_blocks[parents], of_pairs[parents], features[parents]
        of_blocks[more] += self._weights[blocks]
        of_pairs[more] += 2 * products[rows, :, blocks]
        plans[more, blocks] = True
        sums = of_blocks, of_pairs, products
        return self.bound(self._predicted(sums, plans, lowered, clamped=False))

    def _sums(self, features: Features) -> tuple[Floats, Floats, Floats]:
        """The sums of `_weights` over the removed blocks of plans, and of `_pairs` over pairs.

        Weights are in two parts, of which sums are exact in any order: the prediction for a
        plan then depends neither on the plans beside it nor on the machine.

        Returns:
            Sums over blocks, (N, 4 + 2E), and twice those over pairs, (N, 2E); and the sums
            over pairs with each block, (N, 2E, 2L).
        """
        x = features.astype(np.float64)
        products = (x @ self._pairs).reshape(len(x), 2 * len(self.members), x.shape[1])
        return x @ self._weights, np.einsum("neb,nb->ne", products, x), products

    def _predicted(
        self,
        sums: tuple[Floats, Floats, Floats],
        plans: Features,
        lowered: Floats | float,
        clamped: bool,
    ) -> Floats:
        """Each member's prediction for plans (N, 2L) with these `_sums`, nats per token, (N, E)."""
        (of_blocks, of_pairs, _), count = sums, len(self.members)
        numbers, ffn, alone_costs, rest = of_blocks[:, :4].T
        alone_costs = alone_costs + rest + lowered
        logs = self._intercept + (of_blocks[:, 4 : 4 + count] + of_blocks[:, 4 + count :])
        logs += (of_pairs[:, :count] + of_pairs[:, count:]) / 2
        terms = np.array(shape_terms(alone_costs, numbers - ffn, ffn, self.members[0].offset))
        logs += (terms[:, :, None] * self._shape[:, None]).sum(axis=0)
        for column, member in zip(logs.T, self.members, strict=True):
            if member.correction is not None:
                column += member.correction.of_many(plans)
        predicted = np.exp(np.minimum(logs, _MOST_LOG)) - self.members[0].offset
        if clamped:
            worst = np.where(plans, self._alone, -np.inf).max(axis=1, initial=-np.inf)
            least = np.maximum(self._least[numbers.astype(np.int64)], LEAST_SHARE * worst[:, None])
            predicted = np.minimum(np.maximum(predicted, least), self._most)
        predicted[(numbers == 0) & (np.asarray(lowered) <= 0)] = 0.0
        return predicted

    # The weights of all members side by side, so that one product serves all of them.

    @cached_property
    def _alone(self) -> Floats:
        return np.array(self.members[0].alone)

    @cached_property
    def _intercept(self) -> Floats:
        return np.array([member.intercept for member in self.members])

    @cached_property
    def _weights(self) -> Floats:
        """For each block 1, 1 if it is an FFN block, its cost alone and its weights, (2L, 4 + 2E).

        Costs and weights are in two parts.
        """
        blocks = np.arange(len(self._alone))
        alone = _exact_parts(np.maximum(self._alone, 0)[:, None])
        linear = _exact_parts(np.array([member.linear for member in self.members]).T)
        return np.hstack([np.ones((len(blocks), 1)), blocks[:, None] % 2, alone, linear])

    @cached_property
    def _pairs(self) -> Floats:
        """Symmetric matrices side by side, in two parts, (2L, 2E x 2L)."""
        count = len(self._alone)
        matrices = np.zeros((len(self.members), count, count))
        for matrix, member in zip(matrices, self.members, strict=True):
            matrix[pair_indices(count, member.reach)] = member.pairs
        return _exact_parts(np.hstack(list(matrices + matrices.transpose(0, 2, 1))))

    @cached_property
    def _shape(self) -> Floats:
        return np.array([member.shape for member in self.members]).T

    @cached_property
    def _least(self) -> Floats:
        return np.array([member.least for member in self.members]).T

    @cached_property
    def _most(self) -> Floats:
        return np.array([member.most for member in self.members])


class PlanFeatures:
    """The predictor's inputs of the plans of a ladder, as arrays of positions of levels.

    Args:
        ladder: The items.
        costs: ΔNLL if only this item has this level, nats per token, (items, W).
        num_blocks: 2L.
    """

    def __init__(self, ladder: Ladder, costs: Floats, num_blocks: int) -> None:
        self._num_blocks, self._first = num_blocks, ladder.first_levels
        self._block = np.array([item.block for item in ladder.items])
        (self._with_block,) = (self._block >= 0).nonzero()
        lowered, removed = costs.copy(), np.zeros(costs.shape, dtype=bool)
        for number, names in enumerate(ladder.level_names):
            position = names.index("removed")  # for a cache one past its last level
            removed[number, position:], lowered[number, position:] = True, 0.0
        # The levels of all items in one row, which is read faster than by pairs of indices.
        self._lowered, self._removed = lowered.ravel(), removed.ravel()

    def removed(self, positions: Counts) -> Features:
        """The removed blocks of plans, (n, 2L)."""
        levels = positions[:, self._with_block] + self._first[self._with_block]
        removed = np.zeros((len(positions), self._num_blocks), dtype=bool)
        removed[:, self._block[self._with_block]] = self._removed.take(levels)
        return removed

    def block_removed(self, items: Counts, positions: Counts) -> Counts:
        """The blocks that items at some positions of their levels remove, -1 for none, (n,)."""
        return np.where(self._removed.take(self._first[items] + positions), self._block[items], -1)

    def lowered(self, positions: Counts) -> Floats:
        """What the levels of plans other than removal cost alone, nats per token, (n,)."""
        costs = self._lowered.take(positions + self._first)
        return np.maximum(np.add.accumulate(costs, axis=1)[:, -1], 0.0)

    def masks(self, positions: Counts) -> Counts:
        """The positions of the plans that only remove the blocks that some plans remove."""
        return positions * self._removed.take(positions + self._first)


def _exact_parts(weights: Floats) -> Floats:
    """Two parts of weights (rows, columns) side by side: whole multiples of powers of two.

    Sums of each part are exact; what is left out of a weight is below 2**-60.
    """
    high = np.rint(weights * _HIGH) / _HIGH
    return np.hstack([high, np.rint((weights - high) * _LOW) / _LOW])


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
