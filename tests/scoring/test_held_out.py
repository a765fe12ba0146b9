"""Losses on held-out text: measured ones as they are, others predicted."""

import json

import numpy as np
import pytest

from rap_env.errors import ArtifactError
from rap_env.plan import Plan
from rap_env.scoring.held_out import HeldOutLosses

BLOCKS = 20


@pytest.fixture(scope="module")
def plans():
    """Plans with ΔNLL on both texts: held-out text loses a little more with more FFN removed."""
    rng = np.random.default_rng(0)
    calibration, held_out = {Plan(): 0.0}, {Plan(): 0.0}
    for _ in range(300):
        mask = Plan.removing(*rng.permutation(BLOCKS)[: rng.integers(1, 12)].tolist())
        levels = dict.fromkeys(mask.removed_names, "removed")
        if rng.random() < 0.5:
            levels |= {
                f"layer{layer:02}.cache": "int4-window128"
                for layer in range(BLOCKS // 2)
                if f"layer{layer:02}.attn" not in levels
            }
        plan = Plan.of(levels)
        loss = 0.02 * 1.5 ** len(mask.removed) * rng.uniform(0.8, 1.2)
        calibration[plan] = loss
        held_out[plan] = loss * (1.1 + 0.05 * mask.count_removed("ffn")) * rng.uniform(0.95, 1.05)
    return calibration, held_out


@pytest.fixture(scope="module")
def fitted(plans):
    calibration, held_out = plans
    return HeldOutLosses.fitted({"sha256": "x"}, held_out, calibration, BLOCKS)


def test_measured_losses_are_given_as_they_are(plans, fitted):
    calibration, held_out = plans
    for plan, loss in held_out.items():
        assert fitted.delta_nll(plan, calibration[plan]) == loss
        assert not fitted.is_predicted(plan)
    assert fitted.delta_nll(Plan(), 0.0) == 0.0


def test_others_are_predicted_within_the_noise(plans, fitted):
    everything = fitted.fidelity.rows[0]
    assert everything.masks == len(plans[1]) - 1  # not the native model
    assert everything.median_relative_error < 0.06
    assert everything.spearman > 0.99
    few = Plan.removing(1, 3, 5)
    more = Plan.removing(*range(11))
    assert fitted.is_predicted(few)
    assert 0.06 < fitted.delta_nll(few, 0.0675) < 0.12
    assert fitted.delta_nll(more, 1.7) > fitted.delta_nll(few, 0.0675)


def test_a_file_restores_them(plans, fitted):
    again = HeldOutLosses.from_json(json.loads(json.dumps(fitted.to_json())))
    assert again.measured == fitted.measured
    assert again.fidelity == fitted.fidelity
    assert again.delta_nll(Plan.removing(2), 0.3) == fitted.delta_nll(Plan.removing(2), 0.3)


def test_too_few_plans_predict_nothing(plans):
    calibration, held_out = plans
    few = dict(list(held_out.items())[:50])
    with pytest.raises(ArtifactError, match="49 plans were measured.*measure 100"):
        HeldOutLosses.fitted({}, few, calibration, BLOCKS)


def test_a_plan_unlike_all_measured_ones_is_not_taken_for_a_good_one(fitted):
    """Its loss is far beyond the fitted ones; the ratio of both texts stays as measured."""
    ratios = np.exp(fitted.log_ratios)
    assert ratios[0] > 0.9
    assert ratios[1] < 2
    for plan in (Plan.removing(0), Plan.removing(*range(BLOCKS))):
        assert 0.9 * 50 < fitted.delta_nll(plan, 50.0) < 2 * 50
