"""Methods that choose plans: evaluated on pinned budgets of a tiny real model, and reported."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from experiments.compare import compare
from experiments.comparison.evaluation import check_names, evaluation_cells, grid_requests
from experiments.comparison.loading import gather
from experiments.comparison.records import ResultRow
from experiments.config import Config
from experiments.config.common import TasksConfig, TextConfig, parse_pinned
from experiments.config.evaluation import CompareConfig, EvaluateConfig
from experiments.config.model import ImportanceConfig, ModelConfig
from experiments.config.training import AgentConfig, EnvConfig
from experiments.contexts import build_context, ladder_bytes
from experiments.errors import ExperimentError
from experiments.evaluate import evaluate
from experiments.report import report
from experiments.study.records import append_record, read_records
from experiments.train import train
from rap_env.errors import InfeasibleBudgetError, UnknownNameError
from rap_env.request import Request
from tests.tiny import tiny_model, tiny_tokenizer

LEVELS = {
    "weights": ["int8", "int4", "removed"],
    "caches": ["int8", "int4"],
    "embeddings": ["int8", "int4"],
}
BASELINES = ["uniform", "knapsack", "greedy_per_byte", "random"]
PINNED = ["1x16@40000~0.5", "1x16@30000~1", "2x60@90000~0.5", "2x60@75000~1"]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Settings for a random model of four layers in a separate folder."""
    base = tmp_path_factory.mktemp("ladder")
    tiny_model(layers=4).save_pretrained(base / "model")
    tiny_tokenizer().save_pretrained(base / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAP_CACHE_DIR", str(base / "cache"))
        yield Config(
            stage="evaluate", name="tiny", runs_dir=str(base / "runs"), progress=False,
            store=str(base / "scores.sqlite"),
            model=ModelConfig(name=str(base / "model"), device="cpu", dtype="float32"),
            calibration=TextConfig(source="self", windows=2, window_tokens=48),
            importance=ImportanceConfig(method="one_shot", gsi_method="lazy"),
            env=EnvConfig(id="RAPLadder-v0", levels=LEVELS, together=["int8", "int4"]),
            evaluate=EvaluateConfig(
                requests=[], budgets=[], pinned=PINNED, baselines=BASELINES, random_seeds=[0, 1],
                text=TextConfig(source="self", windows=3, window_tokens=48),
            ),
        )  # fmt: skip


@pytest.fixture(scope="module")
def evaluated(config):
    evaluate(config, config.stage_dir("evaluate"))
    return config


def rows_of(config, stage="evaluate"):
    return ResultRow.read(config.stage_dir(stage) / "results.jsonl")


def test_pinned_cells_are_requests_with_bytes():
    assert parse_pinned("4x512@1234").budget_bytes == 1234
    for text in PINNED:
        assert str(parse_pinned(text)) == text
    with pytest.raises(ExperimentError, match="BATCHxTOKENS@BYTES"):
        EvaluateConfig(pinned=["4x512@0.5"])
    with pytest.raises(ExperimentError, match=r"evaluate\.requests needs at least one entry"):
        EvaluateConfig(requests=[])


def test_cells_are_checked_against_the_ladder(config):
    context = build_context(config)
    item_bytes = ladder_bytes(config, context)
    cells = evaluation_cells(config.evaluate, context.memory, item_bytes)
    assert [cell.target_delta_nll for cell in cells] == [0.5, 1.0, 0.5, 1.0]
    assert [cell.request.budget_bytes for cell in cells] == [40000, 30000, 90000, 75000]
    for cell in cells:
        dense = context.memory.dense_peak_bytes(*cell.cell[:2])
        assert cell.cell[2] == cell.request.budget_bytes / dense
    least = item_bytes.costs(1, 16).least_peak_bytes
    tight = replace(config.evaluate, pinned=[f"1x16@{least}"])
    assert grid_requests(tight, context.memory, item_bytes)[0][1].budget_bytes == least
    with pytest.raises(InfeasibleBudgetError, match="No levels of .* in this ladder fit"):
        grid_requests(replace(tight, pinned=[f"1x16@{least - 1}"]), context.memory, item_bytes)


def test_methods_are_checked_before_anything_is_measured(config):
    other = replace(config, evaluate=replace(config.evaluate, baselines=["slebb"]))
    with pytest.raises(UnknownNameError, match="Unknown policy 'slebb'.*uniform"):
        check_names(other)


def test_every_method_has_a_plan_at_every_cell(evaluated):
    rows = rows_of(evaluated)
    assert {row.method for row in rows} == {"dense", *BASELINES}
    assert len(rows) == 4 * (1 + 3 + 2)
    context = build_context(evaluated)
    for row in rows:
        plan = row.plan
        assert row.levels is not None
        assert list(plan.removed_names) == row.mask
        assert row.fits == (row.method != "dense")
        request = Request(**row.request, budget_bytes=row.budget_bytes)
        assert row.peak_bytes == context.memory.peak_bytes(plan, request)
        measured = context.scorer.nll(plan) - context.scorer.dense_nll
        assert row.loss_calibration == pytest.approx(measured)
        assert row.target_loss in (0.5, 1.0)
        assert row.provenance["depends_on"]["ladder"]["levels"] == LEVELS
        assert (row.evaluations > 0) == (row.method in ("uniform", "greedy_per_byte"))
    assert any(set(row.levels.values()) & {"int8", "int4"} for row in rows if row.levels)


def test_existing_rows_are_kept(evaluated):
    path = evaluated.stage_dir("evaluate") / "results.jsonl"
    before = path.read_bytes()
    evaluate(evaluated, path.parent)
    assert path.read_bytes() == before


def test_recorded_plans_are_measured_on_another_text_and_on_tasks(evaluated):
    source = str(evaluated.stage_dir("evaluate"))
    text = replace(evaluated.evaluate.text, windows=4, seed=3)
    tasks = TasksConfig(names=["rap_choice"], limit=2)
    settings = replace(evaluated.evaluate, plans=[source], text=text, tasks=tasks)
    again = replace(evaluated, name="again", evaluate=settings)
    evaluate(again, again.stage_dir("evaluate"))
    old = {(row.method, row.seed, row.cell): row for row in rows_of(evaluated)}
    new = rows_of(again)
    assert len(new) == len(old)
    for row in new:
        first = old[row.method, row.seed, row.cell]
        kept = ("levels", "evaluations", "decision_s", "loss_calibration", "target_loss", "fits")
        assert [getattr(row, name) for name in kept] == [getattr(first, name) for name in kept]
        assert len(row.window_losses) == 4
        assert set(row.accuracies) == set(row.task_documents) == {"rap_choice"}
        assert row.accuracies_norm == {}  # generated tasks have none
        depends = row.provenance["depends_on"]
        assert depends["report_sha256"] != first.provenance["depends_on"]["report_sha256"]
        assert depends["method"] == first.provenance["depends_on"]["method"]
    path = again.stage_dir("evaluate") / "results.jsonl"
    before = path.read_bytes()
    evaluate(again, path.parent)
    assert path.read_bytes() == before


def test_recorded_plans_are_measured_without_tasks_again(evaluated):
    first = replace(evaluated, name="again")
    records = str(first.stage_dir("evaluate"))
    settings = replace(evaluated.evaluate, plans=[records])
    without = replace(evaluated, name="without", evaluate=settings)
    evaluate(without, without.stage_dir("evaluate"))
    for row in rows_of(without):
        assert (row.accuracies, row.accuracies_norm, row.task_documents) == ({}, None, None)


def test_recorded_plans_of_other_settings_are_rejected(evaluated, tmp_path):
    settings = replace(evaluated.evaluate, plans=[str(evaluated.stage_dir("evaluate"))])
    other = replace(
        evaluated, evaluate=settings, calibration=replace(evaluated.calibration, seed=9)
    )
    with pytest.raises(ExperimentError, match="chosen with another calibration text"):
        evaluate(other, tmp_path / "evaluate")
    nothing = replace(evaluated, evaluate=replace(settings, plans=[str(tmp_path / "none")]))
    with pytest.raises(ExperimentError, match="There are no results in"):
        evaluate(nothing, tmp_path / "evaluate")


def test_older_records_have_masks_only(evaluated, tmp_path):
    record = read_records(evaluated.stage_dir("evaluate") / "results.jsonl")[0]
    del record["levels"], record["target_loss"]
    append_record(tmp_path / "results.jsonl", json.loads(json.dumps(record)))
    (row,) = ResultRow.read(tmp_path / "results.jsonl")
    assert row.levels is None
    assert row.plan.removed_names == tuple(row.mask)


def test_tables_show_plans_and_budgets_that_differ(evaluated):
    comparison = gather(evaluated.root).comparison
    assert len(comparison.cells) == 4
    text = compare(CompareConfig(runs=str(evaluated.root)))
    assert "Uniform settings" in text
    assert "about 0.5" in text
    assert "ΔNLL divided by that of Uniform settings" in text


@pytest.mark.slow
def test_the_report_draws_levels(evaluated):
    page = report(evaluated, evaluated.stage_dir("report")).read_text()
    assert "What the policy lowers" in page
    figures = {path.stem for path in (evaluated.stage_dir("report") / "figures").iterdir()}
    assert {"levels_greedy_per_byte", "loss_against_budget"} <= figures
    tables = (evaluated.stage_dir("report") / "tables.md").read_text()
    assert "level of most caches" in tables
    assert "about 0.5 (0 MiB)" in tables


@pytest.mark.slow
def test_trained_policies_choose_plans_too(evaluated):
    """An agent of a few steps, its plans and its samples, beside one baseline."""
    agent = AgentConfig(
        name="maskable_ppo", label="rap", total_timesteps=64, n_envs=2,
        hyperparameters={"n_steps": 16, "batch_size": 16},
    )  # fmt: skip
    workload = {"name": "grid", "batch_sizes": [1], "seq_lens_tokens": [16],
                "budget_fractions": [0.7]}  # fmt: skip
    settings = replace(evaluated.evaluate, baselines=["uniform"], best_of=[1, 3])
    config = replace(
        evaluated, name="agents", agent=agent, workload=workload, evaluate=settings,
        reward={"name": "perplexity"},
    )  # fmt: skip
    train(config, config.stage_dir("train") / "rap-s0")
    evaluate(config, config.stage_dir("evaluate"))
    rows = [row for row in rows_of(config) if row.method.startswith("rap")]
    assert {row.method for row in rows} == {"rap", "rap-best_of=3"}
    assert len(rows) == 2 * len(PINNED)
    ladder = ladder_bytes(config, build_context(config)).ladder
    for row in rows:
        assert row.fits
        ladder.positions(row.plan)
        assert row.setup_evaluations > 0
    page = report(config, config.stage_dir("report")).read_text()
    assert "RAP policy: levels of all items (seed 0)" in page
