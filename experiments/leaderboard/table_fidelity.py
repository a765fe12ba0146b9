"""How well a score table judges methods whose plans it has not measured on held-out text."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from rap_env.leaderboard.entries import published_entries
from rap_env.leaderboard.tasks import pinned_tasks
from rap_env.plan import Plan
from rap_env.scoring.fidelity import spearman
from rap_env.scoring.held_out import HeldOutLosses


def predicted_test_delta_nll(comparison: str) -> dict[str, float]:
    """Return what the table of a comparison predicts for each published method on held-out text.

    The prediction for a method is fitted without its plans, as if the method were new.

    Args:
        comparison: Name of a pinned comparison.

    Returns:
        Mean predicted ΔNLL by the name of the method, nats per token.

    Raises:
        ArtifactError: Too few plans were measured on held-out text without one of the methods.
    """
    tasks = (task for task in pinned_tasks().values() if task.comparison == comparison)
    env: Any = next(task for task in tasks if not task.live).make()
    context = env.unwrapped.context
    measured: HeldOutLosses = context.table.held_out
    dense_nll = context.scorer.dense_nll
    calibration = {plan: context.scorer.nll(plan) - dense_nll for plan in measured.measured}
    found = {}
    for entry in published_entries(comparison):
        plans = [Plan.of(plan) for run in entry.runs for plan in run.plans]
        values = itertools.chain(*(run.delta_nll["calibration"] for run in entry.runs))
        own = set(plans)
        others = {plan: value for plan, value in measured.measured.items() if plan not in own}
        losses = HeldOutLosses.fitted(measured.text, others, calibration, measured.num_blocks)
        found[entry.name] = float(np.mean([*map(losses.delta_nll, plans, values)]))
    return found


def rank_correlation(comparison: str, predicted: Mapping[str, float]) -> float:
    """Return the rank correlation of predicted and measured ΔNLL on held-out text.

    Args:
        comparison: Name of a pinned comparison.
        predicted: Predicted ΔNLL by the name of the published method, nats per token.
    """
    measured = {
        entry.name: float(np.mean([run.delta_nll["test"] for run in entry.runs]))
        for entry in published_entries(comparison)
    }
    values = [(predicted[name], value) for name, value in measured.items()]
    found = spearman(*np.array(values).T)
    assert found is not None, "published methods differ"
    return found
