"""The correction network: what pairs of blocks miss, in sums that no order of additions changes."""

import json
from dataclasses import asdict, replace
from itertools import pairwise

import numpy as np
import pytest

from rap_env.plan import Plan
from rap_env.scoring.predictor import SCALE, CorrectionNetwork, ScoreModel
from rap_env.scoring.predictor_fit import fit_score_model
from rap_env.scoring.score_table import ScoreTable
from tests.envs.tiny_contexts import make_context
from tests.scoring.tiny_table import all_masks, table_of

BLOCKS = 16
ALONE = np.random.default_rng(0).uniform(0.05, 0.5, BLOCKS)
TRIPLES = np.random.default_rng(1).permutation(BLOCKS)[:15].reshape(5, 3)


def losses(removed):
    """Costs add up, and some three blocks cost more together, which no pair of them does."""
    whole = removed[:, TRIPLES].all(axis=2).sum(axis=1)
    return removed @ ALONE * 2.0**whole


def masks(number, seed):
    rng = np.random.default_rng(seed)
    removed = rng.random((number, BLOCKS)) < rng.uniform(0.1, 0.7, (number, 1))
    return np.concatenate([np.zeros((1, BLOCKS), bool), np.eye(BLOCKS, dtype=bool), removed])


def network(blocks):
    """A network of random whole numbers."""
    rng, sizes = np.random.default_rng(7), (blocks, 8, 4, 1)
    layers = [
        (rng.integers(-90, 90, (inputs, outputs)).tolist(), rng.integers(-90, 90, outputs).tolist())
        for inputs, outputs in pairwise(sizes)
    ]
    return CorrectionNetwork(*zip(*layers, strict=True))


@pytest.fixture(scope="module")
def predictor():
    removed = masks(1500, 2)
    model, _ = fit_score_model(removed, losses(removed), ALONE)
    return replace(model.members[0], correction=network(BLOCKS))


def test_it_is_a_perceptron_whose_output_corrects_the_predicted_log(predictor):
    removed = masks(50, 3)
    sums, layers = (
        removed.astype(float),
        list(zip(*vars(predictor.correction).values(), strict=False)),
    )
    for number, (weights, biases) in enumerate(layers):
        products = sums @ np.array(weights)
        sums = (np.floor(products / SCALE + 0.5) if number else products) + np.array(biases)
        sums = np.maximum(sums, 0) if number < len(layers) - 1 else sums / SCALE
    plain, corrected = (
        np.log(ScoreModel((p,)).delta_nll_many(removed, clamped=False)[1:] + p.offset)
        for p in (replace(predictor, correction=None), predictor)
    )
    assert corrected - plain == pytest.approx(sums[1:, 0], abs=1e-9)


def test_corrections_do_not_depend_on_the_order_of_additions(predictor):
    network = predictor.correction
    removed = masks(300, 4)
    together = network.of_many(removed)
    assert together.std() > 0.02
    assert [float(network.of_many(row[None])[0]) for row in removed] == together.tolist()
    assert network.of_many(removed[::-1])[::-1].tolist() == together.tolist()
    assert np.array_equal(together * 2**16, np.round(together * 2**16))


def test_one_mask_is_predicted_as_among_others_and_below_others(predictor):
    removed = masks(200, 5)
    model = ScoreModel((predictor,))
    alone = [model.delta_nll(Plan.removing(*np.flatnonzero(row).tolist())) for row in removed]
    assert model.delta_nll_many(removed).tolist() == alone
    assert alone[0] == 0.0
    parents = np.repeat(np.arange(len(removed)), 2)
    more = np.full(len(parents), -1)
    more[::2] = [int(np.flatnonzero(~row)[0]) if not row.all() else -1 for row in removed]
    plans = removed[parents]
    plans[more >= 0, more[more >= 0]] = True
    free = model.delta_nll_many(plans, clamped=False)
    below = model.delta_nll_below(removed, parents, more, np.zeros(len(parents)))
    assert below == pytest.approx(free, rel=1e-9, abs=1e-9)


def test_a_table_keeps_a_network(tmp_path):
    made = table_of(make_context(), all_masks(6))
    (member,) = made.predictor.members
    assert member.correction is None
    with_network = replace(member, correction=network(6))
    table = replace(made, predictor=ScoreModel((with_network,)))
    table.save(tmp_path / "table.json")
    again = ScoreTable.load(tmp_path / "table.json").predictor
    stored = json.dumps(asdict(again.members[0].correction))
    assert stored == json.dumps(asdict(with_network.correction))
    for mask in all_masks(6, 3):
        assert again.delta_nll(mask) == table.predictor.delta_nll(mask)
