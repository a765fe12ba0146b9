"""The four stages on a tiny real model: end to end, resuming, and rejected settings."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.comparison.result_rows import ResultRow
from experiments.comparison.run_records import finished_trainings
from experiments.config.common import ImportanceConfig
from experiments.config.program_settings import EvaluateConfig
from experiments.evaluate import check_names, evaluate
from experiments.profile import profile
from experiments.study.console import ExperimentError
from experiments.study.json_records import read_records, record_files
from experiments.study.run_folder import RunFolder
from experiments.train import train
from rap_env.errors import InfeasibleBudgetError, UnknownNameError
from tests.experiments.tiny_study import own_text, short_training, tiny_study

BASELINES = ["random", "gsi", "greedy_per_byte", "knapsack"]


@pytest.fixture(scope="module")
def config(base):
    """Settings for a random model of four layers in a separate folder."""
    return tiny_study(
        base, stage="test", importance=ImportanceConfig(gsi_removals=3),
        agent=short_training(gamma=None),
        evaluate=EvaluateConfig(
            requests=["1x16", "2x32"], budgets=[0.9, 0.8], baselines=BASELINES,
            random_seeds=[0, 1], text=own_text(),
        ),
    )  # fmt: skip


@pytest.fixture(scope="module")
def profiled(config):
    profile(config, config.stage_dir("profile"))
    return config


@pytest.fixture(scope="module")
def trained(profiled):
    train(profiled, profiled.stage_dir("train") / "maskable_ppo-s0")
    return profiled


@pytest.fixture(scope="module")
def evaluated(trained):
    evaluate(trained, trained.stage_dir("evaluate"))
    return trained


def test_a_profile_is_not_measured_twice_nor_mixed(profiled):
    path = profiled.stage_dir("profile") / "one_shot.json"
    before = path.stat().st_mtime_ns
    profile(profiled, path.parent)
    assert path.stat().st_mtime_ns == before
    other = replace(profiled, calibration=replace(profiled.calibration, seed=5))
    with pytest.raises(ExperimentError, match=r"calibration\.seed: 0 -> 5"):
        profile(other, path.parent)


def test_a_training_leaves_checkpoints_and_metrics(trained):
    folder = trained.stage_dir("train") / "maskable_ppo-s0"
    facts = RunFolder(folder).read()
    assert facts["timesteps"] >= 64
    assert (facts["method"], facts["seed"]) == ("maskable_ppo", 0)
    assert facts["evaluations"] > 0
    losses = [r["episode/delta_nll"] for r in read_records(folder / "metrics.jsonl")
              if "episode/delta_nll" in r]  # fmt: skip
    assert len(losses) == facts["episodes"]
    assert any((folder / "checkpoints").iterdir())
    assert finished_trainings(trained.root) == [folder]


def test_a_longer_training_continues(trained):
    folder = trained.stage_dir("train") / "maskable_ppo-s0"
    longer = replace(trained, agent=replace(trained.agent, total_timesteps=96))
    train(longer, folder)
    steps = [record["step"] for record in read_records(folder / "metrics.jsonl")]
    assert steps == sorted(steps)
    assert RunFolder(folder).read()["timesteps"] >= 96
    with pytest.raises(ExperimentError, match=r"agent\.n_envs: 2 -> 4"):
        train(replace(trained, agent=replace(trained.agent, n_envs=4)), folder)


def test_every_method_has_a_row_for_every_cell(evaluated):
    rows = ResultRow.read(evaluated.stage_dir("evaluate") / "results.jsonl")
    assert {row.method for row in rows} == {"dense", "maskable_ppo", *BASELINES}
    assert len(rows) == 4 * (1 + 1 + 2 + 3)  # random has two seeds
    for row in rows:
        assert row.fits == (row.peak_bytes <= row.budget_bytes)
        assert row.fits != (row.method == "dense")
        assert row.delta_nll == pytest.approx(sum(row.window_delta_nll) / 3)
        assert row.delta_nll_ci_low <= row.delta_nll <= row.delta_nll_ci_high
        depends = row.provenance["depends_on"]
        assert depends["calibration_sha256"] != depends["report_sha256"]
    by_method = {row.method: row for row in rows}
    assert by_method["dense"].delta_nll == 0
    assert by_method["greedy_per_byte"].evaluations > 0
    assert by_method["maskable_ppo"].evaluations == 0
    assert by_method["maskable_ppo"].setup_evaluations > by_method["gsi"].setup_evaluations > 0


def test_rows_of_other_settings_are_kept_aside_and_restored(evaluated):
    path = evaluated.stage_dir("evaluate") / "results.jsonl"
    whole = read_records(path)
    smaller = replace(evaluated, evaluate=replace(evaluated.evaluate, budgets=[0.9]))
    evaluate(smaller, path.parent)
    assert {row.budget_fraction for row in ResultRow.read(path)} == {0.9}
    assert len(read_records(path.parent / "results.other.jsonl")) == len(whole) // 2
    evaluate(evaluated, path.parent)

    def in_order(rows):
        return sorted(rows, key=lambda row: json.dumps(row, sort_keys=True))

    assert in_order(read_records(path)) == in_order(whole), "decision times too: none is measured"


def test_a_budget_that_no_mask_fits_is_rejected_before_the_start(trained, tmp_path):
    tight = replace(trained, evaluate=replace(trained.evaluate, budgets=[0.01]))
    with pytest.raises(InfeasibleBudgetError, match="No mask of .* fits"):
        evaluate(tight, tmp_path / "evaluate")
    with pytest.raises(InfeasibleBudgetError, match="No mask of .* fits"):
        train(replace(tight, seed=1), tmp_path / "maskable_ppo-s1")
    assert not (tmp_path / "maskable_ppo-s1" / "checkpoints").exists()


def test_unknown_names_and_folders_are_rejected(trained, tmp_path):
    unknown = replace(trained, evaluate=replace(trained.evaluate, baselines=["gready_per_byte"]))
    with pytest.raises(UnknownNameError, match="Did you mean 'greedy_per_byte'"):
        check_names(unknown)
    missing = replace(trained, evaluate=replace(trained.evaluate, agents=[str(tmp_path)]))
    with pytest.raises(ExperimentError, match="holds no training run"):
        check_names(missing)
    nothing = replace(trained, evaluate=replace(trained.evaluate, agents=[], baselines=[]))
    with pytest.raises(ExperimentError, match="nothing to evaluate"):
        check_names(nothing)


def test_published_rows_depend_on_what_rows_depend_on_now(evaluated):
    def depends(rows):
        return [row.provenance["depends_on"] for row in rows]

    own = depends(ResultRow.read(evaluated.stage_dir("evaluate") / "results.jsonl"))
    published = record_files(Path(__file__).parents[2] / "results", "results.jsonl")
    assert published
    for path in published:
        for each in depends(ResultRow.read(path)):
            if "task" in each:  # a row of rap_env.evaluate
                continue
            # "plan" if it was measured again; "repair", the stubs, is empty in older rows
            assert each.keys() - {"plan", "repair"} == own[0].keys()
