"""Predicts ΔNLL of many plans of a ladder at once, from masks and plans that were measured."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from rap_env.costs import Counts
from rap_env.importance.ladder_order import one_shot_costs
from rap_env.importance.level_costs import LevelCosts
from rap_env.ladder.items import Ladder
from rap_env.plan import MaskOrPlan
from rap_env.scoring.predictor import Floats, ScoreModel
from rap_env.scoring.predictor_fit import fit_scores


def fit_plan_predictor(
    scores: Mapping[MaskOrPlan, float],
    costs: LevelCosts,
    ladder: Ladder,
    *,
    members: int = 5,
    pessimism: float = 0.0,
    seed: int = 0,
) -> PlanPredictor:
    """Fit predictors to measured masks and plans, as `fit_scores` does.

    Args:
        scores: NLL of masks and plans, nats per token, with the native model and every single
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
        lowered = one_shot.copy()
        removed = np.zeros((len(ladder), ladder.width), dtype=bool)
        item_of = np.full(len(model.members[0].alone), -1)
        for number, item in enumerate(ladder.items):
            lowered[number, len(item.levels) :] = 0.0  # gone with its block
            if item.kind in ("attn", "ffn") and "removed" in item.levels:
                item_of[2 * (item.layer or 0) + (item.kind == "ffn")] = number
                gone = item.levels.index("removed")
                removed[number, gone], lowered[number, gone] = True, 0.0
        # Of all levels of all items in one row, which is read faster than pairs of indices.
        self._lowered, self._removed = lowered.ravel(), removed.ravel()
        self._first = np.arange(len(ladder)) * ladder.width
        self._blocks = np.flatnonzero(item_of >= 0)
        self._block_items = item_of[self._blocks]
        self._num_blocks = len(item_of)

    def delta_nll(self, positions: Counts) -> Floats:
        """Predicted ΔNLL of plans (n, items), nats per token, (n,)."""
        mean, spread = self.mean_and_spread(positions)
        return mean + self.model.pessimism * spread

    def mean_and_spread(self, positions: Counts) -> tuple[Floats, Floats]:
        """Mean and standard deviation of the members' predictions, nats per token, (n,) each."""
        levels = positions + self._first
        removed = np.zeros((len(positions), self._num_blocks), dtype=bool)
        removed[:, self._blocks] = self._removed.take(levels[:, self._block_items])
        lowered = self._lowered.take(levels).sum(axis=1)
        return self.model.mean_and_spread(removed, np.maximum(lowered, 0.0), clamped=False)
