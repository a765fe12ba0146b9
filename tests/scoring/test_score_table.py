"""Score tables: measured scores are exact, other scores are predicted and flagged."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from rap_env.artifacts import save_artifact
from rap_env.errors import ArtifactError, ModelNotAvailableError, UnknownNameError
from rap_env.plan import Plan
from rap_env.scoring.predictor_fit import feature_matrix
from rap_env.scoring.score_table import (
    ScoreTable,
    TableScorer,
    packaged_names,
    packaged_tables,
    table_path,
)
from tests.envs.tiny_contexts import make_context
from tests.masks import every_mask
from tests.scoring.tiny_table import all_masks, fitted_again, table_of

BLOCKS = 6
WHOLE = [path for path in packaged_tables() if path.name.startswith("small-")]
PREDICTING = [path for path in packaged_tables() if path not in WHOLE]
MODEL = "smollm2-135m"


@pytest.fixture(scope="module")
def context():
    return make_context()


@pytest.fixture(scope="module")
def table(context):
    return table_of(context, all_masks(BLOCKS, 3))


@pytest.fixture
def path(table, tmp_path):
    table.save(tmp_path / "t.json")
    return tmp_path / "t.json"


def test_a_table_round_trips_through_its_file(table, path):
    table = fitted_again(table, members=3, pessimism=2.0)
    table.save(path)
    again = ScoreTable.load(path)
    assert again.scores == table.scores
    assert again.facts == table.facts
    assert asdict(again.predictor) == asdict(table.predictor)
    deep = Plan.removing(0, 1, 2, 3)
    assert again.predictor.delta_nll(deep) == table.predictor.delta_nll(deep)
    assert again.fidelity == table.fidelity
    for name in ("context", "text", "settings", "evaluation_s"):
        assert getattr(again, name) == json.loads(json.dumps(getattr(table, name)))
    assert again.native_nll == table.scores[Plan()]


def test_an_unmeasured_plan_has_a_bound_of_its_whole_loss(table):
    """Members agree on what was measured, so no bound of that part is subtracted."""
    table = fitted_again(
        table, members=3, pessimism=2.0, lowered=lambda plan: 0.02 * len(plan.levels)
    )
    scorer = TableScorer(table, lambda plan: 0.02 * len(plan.levels))
    mask = Plan.removing(0, 4)
    plan = mask.lower({"layer01.attn": "int8", "layer01.ffn": "int8"})
    features = feature_matrix([plan, mask], BLOCKS)
    of_plan, of_mask = table.predictor.of_members(features, np.array([0.04, 0.0]))
    whole = table.scores[mask] + of_plan - of_mask
    assert scorer.nll(plan) == pytest.approx(whole.mean() + 2 * whole.std())
    assert scorer.nll(plan) > whole.mean()
    unknown = Plan.removing(0, 1, 2, 3)
    (members,) = table.predictor.of_members(feature_matrix([unknown], BLOCKS))
    rise = scorer.nll(unknown) - scorer.native_nll
    assert rise == pytest.approx(members.mean() + 2 * members.std())


def test_unmeasured_masks_are_predicted_and_flagged(table, path):
    scorer = TableScorer(ScoreTable.load(path))
    deep = [mask for mask in all_masks(BLOCKS) if len(mask.removed) > 3]
    assert all(map(scorer.is_predicted, deep))
    together = scorer.nll_many(deep)
    assert [scorer.nll(mask) for mask in reversed(deep)] == together[::-1]
    assert together == [table.native_nll + table.predictor.delta_nll(mask) for mask in deep]


def test_it_counts_requested_scores_and_runs_no_model(table):
    scorer, seen = TableScorer(table), []
    masks = [Plan.removing(0), Plan.removing(0), Plan.removing(0, 1, 2, 3), Plan()]
    scorer.nll_many(masks, seen.append)
    scorer.nll_many(masks)
    assert len(seen) == 3
    assert scorer.known == 3
    assert scorer.evaluations == scorer.block_forwards == 0
    assert scorer.evaluation_s == 0.25


def test_a_block_that_the_model_lacks(table):
    with pytest.raises(UnknownNameError, match=r"layer03\.attn.*layer02\.ffn"):
        TableScorer(table).nll(Plan.removing(6))


def test_too_few_scores(context):
    with pytest.raises(ArtifactError, match=r"removed ffn 2: not measured.*too few"):
        table_of(context, all_masks(BLOCKS, 1)[:-1])
    with pytest.raises(ArtifactError, match="7 scores of .* too few.* 12 scores in all"):
        table_of(context, all_masks(BLOCKS, 1))


def test_files_that_are_no_tables_are_rejected(path, tmp_path):
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="truncated or no artifact"):
        ScoreTable.load(path)
    save_artifact(path, "corpus", 1, {})
    with pytest.raises(ArtifactError, match="of the kind 'corpus', but 'score table'"):
        ScoreTable.load(path)
    with pytest.raises(ModelNotAvailableError, match=r"none\.json .*ScoreTable\.fitted"):
        ScoreTable.load(tmp_path / "none.json")
    only = "RAPPrune-v0 has no .* of gemma3-270m, only of .*smollm2-135m; .* is for RAPLadder-v0"
    with pytest.raises(ModelNotAvailableError, match=only):
        ScoreTable.load(table_path("score_table:gemma3-270m"))


def test_measured_plans_stand_beside_masks(context, table, tmp_path):
    plan = Plan.of({"layer00.cache": "int4", "layer01.ffn": "removed"})
    scores = {**table.scores, plan: 7.25, Plan.removing(0, 1, 2, 3): 9.5}
    with pytest.raises(UnknownNameError, match=r"int4 \(layer00\.cache\).*costs of levels"):
        fitted_again(table, scores)
    with_plans = fitted_again(table, scores, lowered=lambda plan: 0.1 * len(plan.levels))
    with_plans.save(tmp_path / "t.json")
    again = ScoreTable.load(tmp_path / "t.json")
    assert again.scores == with_plans.scores
    scorer = TableScorer(again)
    assert scorer.nll(plan) == 7.25
    assert not scorer.is_predicted(plan)
    assert scorer.nll(Plan.removing(0, 1, 2, 3)) == 9.5
    mask = Plan.removing(1)
    assert scorer.nll(mask) == scorer.nll(mask) == table.scores[mask]
    assert scorer.known == 3
    other = Plan.of({"layer00.cache": "int2"})
    assert scorer.is_predicted(other)
    with pytest.raises(UnknownNameError, match=r"int2 \(layer00\.cache\).*live model"):
        scorer.nll(other)
    with pytest.raises(UnknownNameError, match=r"layer09"):
        scorer.nll(Plan.of({"layer09.cache": "int2"}))


def test_a_packaged_table_is_found_by_the_name_of_its_model():
    assert MODEL in packaged_names()
    masks, plans = (table_path(f"score_table:{MODEL}", how) for how in ("bf16", "native"))
    assert masks != plans
    assert {masks, plans} <= set(packaged_tables())
    assert table_path(f"score_table:./{MODEL}") == Path(MODEL)  # a file of this name
    assert sum(path.stat().st_size for path in packaged_tables()) < 2_000_000


@pytest.mark.parametrize("path", WHOLE, ids=lambda path: path.name)
def test_tables_of_small_models_have_every_mask(path):
    table = ScoreTable.load(path)
    assert set(table.scores) == set(every_mask(table.facts.num_blocks))
    assert table.held_out.fidelity.rows[0].spearman >= 0.99
    assert len(table.held_out.measured) >= 300


@pytest.mark.parametrize("path", PREDICTING, ids=lambda path: path.name)
def test_predictions_agree_with_measurements_that_they_were_not_fitted_to(path):
    table = ScoreTable.load(path)
    everything = table.fidelity.rows[0]
    assert everything.masks >= 100
    assert everything.spearman >= 0.99
    assert everything.median_relative_error <= (0.06 if "low-bits" in path.name else 0.05)
    assert table.fidelity.rows[-1].spearman >= 0.98
    assert (table.levels is None) == (".bf16." in path.name)
