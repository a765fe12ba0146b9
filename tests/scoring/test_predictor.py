"""Predicted losses: accurate near measured masks, bounded far from them."""

import json
from dataclasses import asdict

import numpy as np
import pytest

from rap_env.plan import Plan
from rap_env.scoring.fidelity import Fidelity, FidelityRow, spearman
from rap_env.scoring.predictor import LEAST_SHARE, ScoreModel
from rap_env.scoring.predictor_fit import fit_score_model

BLOCKS, CEILING = 16, 8.0
RNG = np.random.default_rng(0)
ALONE = np.concatenate([[CEILING * 0.9], RNG.uniform(0.05, 0.5, BLOCKS - 1)])
PAIRS = (
    0.2 * np.triu(RNG.normal(size=(BLOCKS, BLOCKS)) ** 2, 1) * (RNG.random((BLOCKS, BLOCKS)) < 0.3)
)


def losses(removed):
    """Costs add up, some pairs cost more, and it all levels off, as in a real model."""
    x = removed.astype(float)
    total = x @ ALONE + np.einsum("ni,ij,nj->n", x, PAIRS, x)
    return CEILING * (1 - np.exp(-total / CEILING))


def masks(number, most=BLOCKS, seed=1):
    rng = np.random.default_rng(seed)
    removed = np.zeros((number, BLOCKS), dtype=bool)
    for row in removed:
        row[rng.permutation(BLOCKS)[: rng.integers(1, most + 1)]] = True
    return np.concatenate([np.zeros((1, BLOCKS), bool), np.eye(BLOCKS, dtype=bool), removed])


SINGLE = losses(np.eye(BLOCKS, dtype=bool))


def mask_of(row):
    return Plan.removing(*np.flatnonzero(row).tolist())


def fitted(number=1500, most=BLOCKS, seed=0):
    removed = masks(number, most)
    model, fidelity = fit_score_model(removed, losses(removed), SINGLE, seed=seed)
    return model.members[0], fidelity


@pytest.fixture(scope="module")
def predictor():
    return fitted()[0]


def test_it_predicts_held_out_plans_from_what_their_other_levels_cost():
    rng = np.random.default_rng(5)
    removed = masks(1500)
    lowered = rng.uniform(0, 0.3, len(removed)) * (rng.random(len(removed)) < 0.7)
    lowered[: 1 + BLOCKS] = 0.0
    total = -CEILING * np.log1p(-losses(removed) / CEILING) + lowered
    values = CEILING * (1 - np.exp(-total / CEILING))
    fit, held = slice(None, -200), slice(-200, None)
    model, _ = fit_score_model(removed[fit], values[fit], SINGLE, lowered[fit])
    found = model.delta_nll_many(removed[held], lowered[held])
    assert np.median(np.abs(found / values[held] - 1)) < 0.05
    one = model.delta_nll(mask_of(removed[-1]), float(lowered[-1]))
    assert one == found[-1]
    blind = model.delta_nll_many(removed[held])
    few = removed[held].sum(axis=1) < 5  # where the other levels matter
    errors = [np.abs(predicted - values[held])[few].mean() for predicted in (blind, found)]
    assert errors[0] > 1.3 * errors[1]
    alone = model.delta_nll(Plan(), 0.2)
    assert model.delta_nll(Plan()) == 0.0 < alone
    assert alone == pytest.approx(0.2, rel=0.3)


def test_the_fidelity_is_that_of_unseen_masks():
    _, fidelity = fitted()
    everything, *parts = fidelity.rows
    assert fidelity.fitted + everything.masks == 1500 + 1 + BLOCKS
    assert everything.masks == pytest.approx(152, abs=1)
    assert sum(row.masks for row in parts) == everything.masks
    assert 0.97 < everything.spearman < 1
    assert 0 < everything.mean_error < 0.5
    # Noise cannot be predicted: a fidelity that knew the answers would not fall.
    removed = masks(1500)
    noise = np.random.default_rng(2).uniform(0, 5, len(removed))
    _, none = fit_score_model(removed, noise, SINGLE)
    assert abs(none.rows[0].spearman) < 0.3


def test_the_seed_alone_decides_what_is_held_out():
    assert fitted()[0] is not fitted()[0]
    assert asdict(fitted()[0]) == asdict(fitted()[0])
    assert fitted()[1] == fitted()[1] != fitted(seed=1)[1]


def test_extrapolations_are_clipped_to_measured_values():
    predictor, _ = fitted(400, most=4)  # nothing with more than four removals
    model = ScoreModel((predictor,))
    removed = masks(400, most=4)
    rng = np.random.default_rng(5)
    for number in range(1, BLOCKS + 1):
        for _ in range(50):
            mask = rng.permutation(BLOCKS)[:number].tolist()
            loss = model.delta_nll(Plan.removing(*mask))
            assert loss <= losses(removed).max()
            assert loss >= predictor.least[number] >= predictor.least[number - 1]
            assert loss >= LEAST_SHARE * losses(np.eye(BLOCKS, dtype=bool))[mask].max()
    heavy = losses(removed)[removed.sum(axis=1) == 4].min()
    assert model.delta_nll(Plan.removing(*range(BLOCKS))) >= heavy > 0


def test_one_lucky_deep_mask_does_not_set_the_bound():
    removed = masks(400, most=4)
    deep = np.zeros((1, BLOCKS), dtype=bool)
    deep[0, 1:11] = True
    values = np.concatenate([losses(removed), [7.5]])
    model, _ = fit_score_model(np.concatenate([removed, deep]), values, SINGLE)
    (predictor,) = model.members
    assert predictor.least[10] == predictor.least[4] < 2


def test_rank_correlation_with_ties():
    assert spearman(np.array([1.0, 2, 3]), np.array([10.0, 20, 30])) == pytest.approx(1)
    assert spearman(np.array([1.0, 2, 3]), np.array([3.0, 2, 1])) == pytest.approx(-1)
    # By hand: ranks 1.5 1.5 3 4 and 1 2 3 4.
    found = spearman(np.array([5.0, 5, 6, 7]), np.array([1.0, 2, 3, 4]))
    assert found == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    assert spearman(np.ones(3), np.arange(3.0)) is None


def test_the_fidelity_of_groups():
    counts, measured = np.array([1, 2, 4, 9]), np.array([0.1, 0.2, 1.0, 0.0])
    predicted = np.array([0.15, 0.25, 1.1, 0.005])
    fidelity = Fidelity.of(predicted, measured, counts, 16, fitted=1200)
    assert fidelity.rows[0].mean_error == pytest.approx(0.05125)
    assert [row.masks for row in fidelity.rows] == [4, 2, 1, 1]
    assert fidelity.rows[3].median_relative_error == pytest.approx(0.5)  # a loss of 0 counts 0.01
    assert Fidelity.from_json(json.loads(json.dumps(asdict(fidelity)))) == fidelity
    assert FidelityRow.of("many", measured[:0], measured[:0]).spearman is None


def shallow():
    """Masks that remove few blocks, none of them the first two together."""
    removed = masks(600, most=6)
    return removed[~(removed[:, 0] & removed[:, 1])]


@pytest.fixture(scope="module")
def model():
    removed = shallow()
    return fit_score_model(removed, losses(removed), SINGLE, members=5)[0]


def test_members_disagree_more_on_masks_unlike_those_measured(model):
    known = shallow()[1 + BLOCKS :]
    deep = masks(400, seed=3)[1 + BLOCKS :]
    deep = deep[deep.sum(axis=1) >= 10]
    near = model.of_members(known, clamped=False).std(axis=1)
    far = model.of_members(deep, clamped=False).std(axis=1)
    assert np.median(far / losses(deep)) > 3 * np.median(near / losses(known))


def test_pessimism_makes_a_prediction_worse_by_the_spread(model):
    other = masks(50, seed=6)[1 + BLOCKS :]
    pessimistic = ScoreModel(model.members, pessimism=2.0)
    members = model.of_members(other)
    mean, spread = members.mean(axis=1), members.std(axis=1)
    assert pessimistic.delta_nll_many(other) == pytest.approx(mean + 2 * spread)
    assert (pessimistic.delta_nll_many(other) >= model.delta_nll_many(other)).all()


def test_no_masks_have_no_predictions(model):
    assert model.delta_nll_many(np.zeros((0, BLOCKS), dtype=bool)).shape == (0,)


def test_bounds_hold_for_many_masks_as_for_one(model):
    other = masks(200, seed=7)
    member = ScoreModel(model.members[:1])
    alone = [member.delta_nll(mask_of(row)) for row in other]
    assert member.delta_nll_many(other).tolist() == alone
    assert model.delta_nll_many(other).tolist() == [model.delta_nll(mask_of(r)) for r in other]
    free = member.delta_nll_many(other, clamped=False)
    assert (free != member.delta_nll_many(other)).any()  # some prediction was clamped
