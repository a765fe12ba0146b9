"""An ensemble of predictors: its mean predicts, its spread grows where nobody measured."""

from dataclasses import fields

import numpy as np
import pytest

from rap_env.blocks import BlockMask
from rap_env.scoring.fidelity import spearman
from rap_env.scoring.predictor import ScoreModel, fit_score_model
from rap_env.scoring.score_table import ScoreTable
from tests.envs.conftest import make_context
from tests.scoring.test_predictor import BLOCKS, fitted, losses, mask_of, masks
from tests.scoring.tiny_table import all_masks, table_of

ALONE = losses(np.eye(BLOCKS, dtype=bool))


def shallow():
    """Masks that remove few blocks, none of them the first two together."""
    removed = masks(600, most=6)
    return removed[~(removed[:, 0] & removed[:, 1])]


@pytest.fixture(scope="module")
def model():
    removed = shallow()
    return fit_score_model(removed, losses(removed), ALONE)[0]


def test_it_predicts_masks_that_it_never_saw(model):
    other = masks(300, most=6, seed=99)[1 + BLOCKS :]
    assert spearman(model.delta_nll_many(other), losses(other)) > 0.95


def test_one_mask_is_predicted_as_among_others(model):
    other = masks(50, seed=5)
    alone = [model.delta_nll(mask_of(row)) for row in other]
    assert model.delta_nll_many(other) == pytest.approx(alone, abs=1e-9)
    assert model.delta_nll_many(other)[0] == 0.0  # the dense model


def test_members_disagree_more_on_masks_unlike_those_measured(model):
    known = shallow()[1 + BLOCKS :]
    deep = masks(400, seed=3)[1 + BLOCKS :]
    deep = deep[deep.sum(axis=1) >= 10]
    _, near = model.mean_and_spread(known, clamped=False)
    _, far = model.mean_and_spread(deep, clamped=False)
    assert np.median(far / losses(deep)) > 3 * np.median(near / losses(known))


def test_pessimism_makes_a_prediction_worse_by_the_spread(model):
    other = masks(50, seed=6)[1 + BLOCKS :]
    pessimistic = ScoreModel(model.members, pessimism=2.0)
    mean, spread = model.mean_and_spread(other)
    assert pessimistic.delta_nll_many(other) == pytest.approx(mean + 2 * spread)
    assert (pessimistic.delta_nll_many(other) >= model.delta_nll_many(other)).all()


def test_a_single_member_is_the_predictor_itself():
    removed = masks(1500)
    single, fidelity = fit_score_model(removed, losses(removed), ALONE, members=1)
    predictor, same = fitted()
    assert single.members[0].linear == predictor.linear
    assert fidelity == same
    assert single.mean_and_spread(removed)[1].max() == 0


def test_bounds_hold_for_many_masks_as_for_one(model):
    other = masks(200, seed=7)
    member = model.members[0]
    alone = [member.delta_nll(mask_of(row)) for row in other]
    assert member.delta_nll_many(other) == pytest.approx(alone, abs=1e-9)
    free = member.delta_nll_many(other, clamped=False)
    assert (free != member.delta_nll_many(other)).any()  # some prediction was clamped


def test_a_table_keeps_the_ensemble_and_its_pessimism(tmp_path):
    context = make_context()
    single = table_of(context, all_masks(6, 3))
    origin = {
        f.name: getattr(single, f.name)
        for f in fields(single)
        if f.name not in ("facts", "scores", "predictor", "fidelity")
    }
    table = ScoreTable.fitted(single.facts, single.scores, members=3, pessimism=2.0, **origin)
    table.save(tmp_path / "table.json")
    again = ScoreTable.load(tmp_path / "table.json").predictor
    assert (len(again.members), again.pessimism) == (3, 2.0)
    mask = BlockMask.of(0, 1, 3, 4)
    assert again.delta_nll(mask) == table.predictor.delta_nll(mask)
