"""Export of a score table: content, resuming after a kill, training on it, rejected settings."""

import gzip
import json
from dataclasses import replace

import gymnasium as gym
import pytest

from experiments.comparison.run_records import TABLE_FILE
from experiments.config.common import ImportanceConfig, ModelConfig
from experiments.config.program_settings import EvaluateConfig, ExportConfig, FrontierConfig
from experiments.contexts import build_context
from experiments.evaluate import evaluate
from experiments.export_scores import export_scores, recorded_scores
from experiments.profile import profile
from experiments.study.run_folder import RunFolder
from experiments.train import train
from rap_env.errors import RapError
from rap_env.importance.plan_table import PlanTable
from rap_env.plan import Plan
from rap_env.scoring.score_table import ScoreTable
from tests.experiments.tiny_study import WORKLOAD, own_text, short_training, tiny_study

PLANS = 150


@pytest.fixture(scope="module")
def config(base):
    """Settings for a random model of five layers."""
    return tiny_study(
        base, layers=5, stage="export_scores", threads=1,
        importance=ImportanceConfig(gsi_removals=3),
        agent=short_training(),
        evaluate=EvaluateConfig(requests=["1x16"], budgets=[0.9], baselines=["gsi"]),
        frontier=FrontierConfig(evaluations=PLANS),
    )  # fmt: skip


@pytest.fixture(scope="module")
def exported(config):
    """The table's path; its scores are those that a search of the best plans measured."""
    profile(replace(config, stage="profile"), config.stage_dir("profile"))
    return export_scores(config, config.stage_dir("export_scores"))


@pytest.mark.slow
def test_a_table_with_levels_runs_the_environment_of_levels(config, exported):
    calibration = own_text(3, 48)
    levels = replace(
        config, name="levels", calibration=calibration, export=ExportConfig(levels=True)
    )
    profile(replace(levels, stage="profile"), levels.stage_dir("profile"))
    table = ScoreTable.load(path := export_scores(levels, levels.stage_dir("export_scores")))
    assert ScoreTable.load(exported).levels is None
    assert "int4" in table.levels["costs"]["layer00.cache"]
    plan, live = max(table.scores, key=lambda plan: len(plan.levels)), build_context(levels)
    assert table.scores[plan] == live.scorer.nll(plan)
    env = gym.make(
        "RAPLadder-v0", model=f"score_table:{path}", workload=WORKLOAD,
        levels={"weights": ["int8", "removed"], "caches": ["int8", "int4"]},
    )  # fmt: skip
    observation, info = env.reset(seed=0)
    over = False
    while not over:
        action = env.action_space.sample(observation["action_mask"])
        observation, _, over, _, info = env.step(action)
    assert info["delta_nll"] == pytest.approx(-sum(info["reward_terms"].values()))


def test_a_table_has_the_stored_masks_and_its_fidelity(config, exported, capsys):
    table = ScoreTable.load(exported)
    assert exported.name == TABLE_FILE
    masks = len(table.scores)
    assert masks >= 20, "twice the blocks"
    live = build_context(config)
    for mask in [Plan(), Plan.removing(3), *list(table.scores)[-5:]]:
        assert table.scores[mask] == live.scorer.nll(mask)
    assert table.text["sha256"] == live.scorer.corpus.sha256
    assert table.settings["calibration"]["windows"] == 3
    text = gzip.decompress(exported.read_bytes()).decode()
    assert str(exported.parents[3]) not in text.replace(config.model.name, "")
    assert RunFolder(exported.parent).read()["masks"] == masks
    export_scores(config, exported.parent)
    printed = capsys.readouterr().out
    assert f"Fidelity on {table.fidelity.rows[0].masks} masks held out, fitted to" in printed
    assert f"{masks} masks in {exported}" in printed
    again = ScoreTable.load(exported)
    assert again.scores == table.scores
    assert again.fidelity == table.fidelity


def test_all_stored_scores_are_used(config, exported, tmp_path):
    live = build_context(config)
    live.scorer.nll(Plan.removing(0, 2, 4, 6, 7))
    path = tmp_path / "deep" / "mine.json"
    settings = replace(config, export=ExportConfig(path=str(path)))
    assert export_scores(settings, tmp_path / "run") == path
    assert Plan.removing(0, 2, 4, 6, 7) in ScoreTable.load(path).scores


def test_recorded_scores_are_not_measured_again(config, exported, tmp_path):
    recorded = replace(config, name="recorded", frontier=FrontierConfig(evaluations=60))
    profile(recorded, recorded.stage_dir("profile"))
    frontier = PlanTable.load(
        recorded.root / "profile" / "frontier.json", build_context(config).memory
    )
    policys = Plan.removing(0, 1, 4, 5, 8, 9)
    rounds = recorded.root / "train" / "rap-s0" / "rounds.jsonl"
    rounds.parent.mkdir(parents=True)
    rounds.write_text(json.dumps({"round": 0, "scored": [[policys.levels, 7.5]]}) + "\n")
    export = ExportConfig(records=[str(recorded.root)])
    fresh = replace(config, store=str(tmp_path / "fresh.sqlite"), export=export)
    scores = ScoreTable.load(export_scores(fresh, tmp_path / "run")).scores
    assert scores[policys] == 7.5
    assert {len(mask.removed) for mask in scores} > {0, 1}
    assert len(scores) >= len(frontier.scores) > 20
    assert build_context(fresh).scorer.evaluations <= 11, "the native model and single removals"
    context, shift = build_context(fresh), 0.25  # of a machine that rounds very differently
    shifted = {mask: nll + shift for mask, nll in frontier.scores.items()}
    moved = replace(frontier, dense_nll=frontier.dense_nll + shift, scores=shifted)
    moved.save(recorded.root / "profile" / "frontier.json")
    again = recorded_scores(export.records, context)
    assert again[policys] == 7.5 - shift
    assert again == pytest.approx({**frontier.scores, policys: 7.5 - shift})
    other = replace(fresh, calibration=replace(config.calibration, seed=5))
    with pytest.raises(RapError, match="was measured on other text"):
        export_scores(other, tmp_path / "other")
    none = replace(fresh, export=ExportConfig(records=[str(tmp_path)]))
    with pytest.raises(RapError, match="has no recorded scores"):
        export_scores(none, tmp_path / "none")


def test_stages_that_need_the_model_reject_a_table(config, exported, tmp_path):
    model = ModelConfig(name=f"score_table:{exported}")
    for stage, run in (
        ("profile", profile),
        ("evaluate", evaluate),
        ("export_scores", export_scores),
    ):
        settings = replace(config, stage=stage, name="refused", model=model)
        with pytest.raises(RapError, match=f"experiments.{stage} needs a live model"):
            run(settings, tmp_path / stage)
    other = replace(config, stage="train", model=replace(model, dtype="bfloat16"))
    with pytest.raises(RapError, match="measured with dtype='float32'"):
        train(other, tmp_path / "maskable_ppo-s0")


def test_an_empty_store_is_reported_before_measuring(config, tmp_path):
    empty = replace(config, store=str(tmp_path / "empty.sqlite"), export=ExportConfig())
    with pytest.raises(RapError, match=r"has no scores of .*frontier\.evaluations=3000"):
        export_scores(empty, tmp_path / "run")
    assert build_context(empty).scorer.evaluations == 0
    with pytest.raises(RapError, match="store is null"):
        export_scores(replace(config, store=None), tmp_path / "run")
