"""Predicts ΔNLL of many plans of a ladder at once, from plans that were measured."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from rap_env.importance.level_costs import LevelCosts
from rap_env.importance.orders import one_shot_costs
from rap_env.ladder.items import Counts, Ladder
from rap_env.plan import Plan
from rap_env.scoring.predictor import Features, Floats, ScoreModel
from rap_env.scoring.predictor_fit import fit_scores


def fit_plan_predictor(
    scores: Mapping[Plan, float],
    costs: LevelCosts,
    ladder: Ladder,
    *,
    members: int = 5,
    pessimism: float = 0.0,
    seed: int = 0,
) -> PlanPredictor:
    """Fit predictors to measured plans, as `fit_scores` does.

    Args:
        scores: NLL of plans, nats per token, with the native model and every single
            removal.
        costs: One-shot costs of the ladder's levels.
        ladder: The items.
        members: Predictors of the ensemble.
        pessimism: As in `ScoreModel`.
        seed: Seed of the fit.
    """
    model, _ = fit_scores(
        scores,
        2 * costs.num_layers,
        costs.delta_nll,
        members=members,
        pessimism=pessimism,
        seed=seed,
    )
    return PlanPredictor(ladder, one_shot_costs(costs, ladder), model)


class PlanPredictor:
    """Predicts ΔNLL of the plans of a ladder, as arrays of positions.

    Args:
        ladder: The items.
        one_shot: ΔNLL if only this item has this level, nats per token, (items, W).
        model: Predicts from removed blocks and from what other levels cost.
    """

    def __init__(self, ladder: Ladder, one_shot: Floats, model: ScoreModel) -> None:
        self.ladder, self.model = ladder, model
        self._num_blocks = len(model.members[0].alone)
        self._block = np.array([item.block for item in ladder.items])
        lowered = one_shot.copy()
        removed = np.zeros((len(ladder), ladder.width), dtype=bool)
        for number, item in enumerate(ladder.items):
            lowered[number, len(item.levels) :] = 0.0  # gone with its block
            if "removed" in item.levels:
                position = item.levels.index("removed")
                removed[number, position], lowered[number, position] = True, 0.0
        # The levels of all items in one row, which is read faster than by pairs of indices.
        self._lowered, self._removed = lowered.ravel(), removed.ravel()
        self._first = np.arange(len(ladder)) * ladder.width
        self._with_block = np.flatnonzero(self._block >= 0)

    def delta_nll(self, positions: Counts) -> Floats:
        """Predicted ΔNLL of plans (n, items), nats per token, (n,)."""
        lowered = self._lowered_costs(positions)
        return self.model.delta_nll_many(self._features(positions), lowered, clamped=False)

    def delta_nll_below(
        self, positions: Counts, children: Counts, parents: Counts, items: Counts
    ) -> Floats:
        """As `delta_nll` for plans one action below others, in a fraction of the time.

        Args:
            positions: The others, (m, items).
            children: The plans, (n, items).
            parents: The row of the plan that each was made from, (n,).
            items: The item that was lowered, (n,).
        """
        levels = children[np.arange(len(children)), items] + self._first[items]
        removed = np.where(self._removed.take(levels), self._block[items], -1)
        lowered = self._lowered_costs(children)
        return self.model.delta_nll_below(self._features(positions), parents, removed, lowered)

    def _features(self, positions: Counts) -> Features:
        """The removed blocks of plans, (n, 2L)."""
        levels = positions[:, self._with_block] + self._first[self._with_block]
        removed = np.zeros((len(positions), self._num_blocks), dtype=bool)
        removed[:, self._block[self._with_block]] = self._removed.take(levels)
        return removed

    def _lowered_costs(self, positions: Counts) -> Floats:
        """What the levels of plans other than removal cost alone, nats per token, (n,)."""
        costs: Floats = self._lowered.take(positions + self._first).sum(axis=1)
        return np.maximum(costs, 0.0)
