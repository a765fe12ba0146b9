"""The record of tasks across models, and the budgets of real models."""

from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

from experiments.unseen import (
    MODELS,
    POLICY,
    RECORD,
    RUNS,
    UnseenRecord,
    generalisation,
    requests_of,
)
from rap_env.leaderboard.unseen import ORDER_LOSSES
from rap_env.policies.loading import make_method
from rap_env.policies.method import Basis

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def record():
    return UnseenRecord(ROOT / RECORD)


def test_an_estimate_is_the_mean_over_seeds_with_an_interval_over_models(record):
    rows = record.rows(name=POLICY, runs=0, part="Test", trained_on=MODELS)
    estimate = record.estimate(POLICY, 0)
    assert estimate.seeds == len(rows) == len({row["seed"] for row in rows})
    assert estimate.mean == pytest.approx(np.exp(np.mean(np.log([row["score"] for row in rows]))))
    assert estimate.low < estimate.mean < estimate.high
    assert record.by_seed(POLICY).split(", ") == [f"{row['score']:.3f}" for row in rows]
    assert record.estimate("Knapsack", RUNS[-1]) is None


def test_what_is_in_the_record_is_not_evaluated_again(record):
    row = record.rows(name="Knapsack", part="Test")[0]
    key = {name: row[name] for name in ("name", "part", "runs")}
    before = record.body["test_evaluations"]
    assert record.evaluate(None, key) == row["score"]
    assert record.body["test_evaluations"] == before


def test_the_figure_shows_both_groups_of_models_at_each_number(record):
    (axis,) = generalisation(record).axes
    labels = [label for _, label in zip(*axis.get_legend_handles_labels(), strict=True)]
    assert labels == ["16 held-out models", "its own training models"]
    assert [text.get_text() for text in axis.get_xticklabels()][-1] == str(MODELS)


def test_at_the_budgets_of_a_real_model_the_costs_of_the_order_add_up_to_the_losses():
    levels = {"weights": ["int8", "int4", "removed"], "embeddings": ["int8", "int4"]}
    env = gym.make(
        "RAPLadder-v0", model="score_table:smollm2-135m", levels=levels, together=()
    ).unwrapped
    basis = Basis(env.context, env.encoder.ladder_bytes)
    requests = requests_of(basis)
    order, costs = make_method("cost_per_byte", *basis), env.context.level_costs(env.ladder)
    sums = [costs.delta_nll(order.choose(request)) for request in requests]
    assert all(loss <= total < 1.5 * loss for loss, total in zip(ORDER_LOSSES, sums, strict=True))
