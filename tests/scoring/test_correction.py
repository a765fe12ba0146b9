"""The correction network: what pairs of blocks miss, in sums that no order of additions changes."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch

from rap_env.plan import Plan
from rap_env.scoring import score_table
from rap_env.scoring.predictor import ScoreModel
from rap_env.scoring.predictor_fit import fit_correction, fit_score_model
from rap_env.scoring.score_table import ScoreTable
from tests.envs.tiny_contexts import make_context
from tests.scoring.tiny_table import all_masks, fitted_again, table_of

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


@pytest.fixture(scope="module")
def fitted():
    removed = masks(1500, 2)
    scores = removed, losses(removed), ALONE
    return [fit_score_model(*scores, network=network) for network in (False, True)]


@pytest.fixture(scope="module")
def predictor(fitted):
    return fitted[1][0].members[0]


def test_it_predicts_what_pairs_of_blocks_miss(fitted):
    removed = masks(500, 3)[1 + BLOCKS :]
    removed = removed[removed.any(axis=1)]
    errors = [
        np.median(np.abs(model.delta_nll_many(removed) / losses(removed) - 1))
        for model, _ in fitted
    ]
    assert errors[1] < errors[0] / 2
    stated = [fidelity.rows[0].median_relative_error for _, fidelity in fitted]
    assert stated == pytest.approx(errors, rel=0.5), "the fidelity is that of the whole predictor"


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


def test_the_seed_alone_decides_the_network():
    removed = masks(300, 6)
    targets = losses(removed)
    state = torch.get_rng_state()
    one, same = (asdict(fit_correction(removed, targets, seed=0)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state), "others' random numbers are left alone"
    assert one == same != asdict(fit_correction(removed, targets, seed=1))


def test_a_table_of_many_scores_keeps_its_network(tmp_path, monkeypatch):
    few = table_of(make_context(), all_masks(6))
    assert few.predictor.members[0].correction is None
    monkeypatch.setattr(score_table, "NETWORK_SCORES", len(few.scores))
    table = fitted_again(few)
    table.save(tmp_path / "table.json")
    again = ScoreTable.load(tmp_path / "table.json").predictor
    network = table.predictor.members[0].correction
    assert json.dumps(asdict(again.members[0].correction)) == json.dumps(asdict(network))
    for mask in all_masks(6, 3):
        assert again.delta_nll(mask) == table.predictor.delta_nll(mask)
