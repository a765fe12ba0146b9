"""Methods that choose plans: evaluated on pinned budgets of a tiny real model, and reported."""

from dataclasses import replace

import pytest

from experiments.comparison.result_rows import ResultRow
from experiments.config.common import ImportanceConfig, TasksConfig, parse_pinned
from experiments.config.program_settings import EnvSettings, EvaluateConfig
from experiments.contexts import build_context, evaluation_cells, make_ladder_bytes
from experiments.evaluate import evaluate
from experiments.study.console import ExperimentError
from rap_env.errors import InfeasibleBudgetError
from rap_env.plan import Plan
from rap_env.request import Request
from tests.experiments.tiny_study import own_text, tiny_study

LEVELS = {
    "weights": ["int8", "int4", "removed"],
    "caches": ["int8", "int4"],
    "embeddings": ["int8", "int4"],
}
BASELINES = ["uniform", "knapsack", "greedy_per_byte", "random"]
PINNED = ["1x16@40000~0.5", "1x16@30000~1", "2x60@90000~0.5", "2x60@75000~1"]


@pytest.fixture(scope="module")
def config(base):
    """Settings for a random model of four layers in a separate folder."""
    return tiny_study(
        base, stage="evaluate", calibration=own_text(2, 48),
        importance=ImportanceConfig(method="one_shot", gsi_method="lazy"),
        env=EnvSettings(id="RAPLadder-v0", levels=LEVELS, together=["int8", "int4"]),
        evaluate=EvaluateConfig(
            requests=[], budgets=[], pinned=PINNED, baselines=BASELINES, random_seeds=[0, 1],
            text=own_text(3, 48),
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
        parse_pinned("4x512@0.5")


def test_cells_are_checked_against_the_ladder(config):
    context = build_context(config)
    ladder_bytes = make_ladder_bytes(config, context)
    cells = evaluation_cells(config.evaluate, ladder_bytes)
    assert [cell.target_delta_nll for cell in cells] == [0.5, 1.0, 0.5, 1.0]
    assert [cell.request.budget_bytes for cell in cells] == [40000, 30000, 90000, 75000]
    for cell in cells:
        dense = context.memory.native_peak_bytes(*cell.cell[:2])
        assert cell.cell[2] == cell.request.budget_bytes / dense
    least = ladder_bytes.costs(1, 16).least_peak_bytes
    tight = replace(config.evaluate, pinned=[f"1x16@{least}"])
    assert evaluation_cells(tight, ladder_bytes)[0].request.budget_bytes == least
    with pytest.raises(InfeasibleBudgetError, match="No levels of .* in this ladder fit"):
        evaluation_cells(replace(tight, pinned=[f"1x16@{least - 1}"]), ladder_bytes)


def test_every_method_has_a_plan_at_every_cell(evaluated):
    rows = rows_of(evaluated)
    assert {row.method for row in rows} == {"dense", *BASELINES}
    assert len(rows) == 4 * (1 + 3 + 2)
    context = build_context(evaluated)
    for row in rows:
        plan = row.plan
        assert row.fits == (row.method != "dense")
        request = Request(**row.request, budget_bytes=row.budget_bytes)
        assert row.peak_bytes == context.memory.peak_bytes(plan, request)
        measured = context.scorer.nll(plan) - context.scorer.native_nll
        assert row.calibration_delta_nll == pytest.approx(measured)
        assert row.target_delta_nll in (0.5, 1.0)
        assert row.provenance["depends_on"]["ladder"]["levels"] == LEVELS
        assert (row.evaluations > 0) == (row.method in ("uniform", "greedy_per_byte"))
        assert (row.kl_divergence_mean > 0) == (row.plan != Plan())
        assert row.kl_divergence_p99 >= row.kl_divergence_mean
        assert (row.same_top_token_share == 1) >= (row.plan == Plan())
        assert row.flipped_answers_share is row.accuracy_above_chance is None
    assert any(set(row.levels.values()) & {"int8", "int4"} for row in rows if row.levels)


def test_plans_are_measured_on_another_text_and_on_tasks(evaluated):
    text = replace(evaluated.evaluate.text, windows=4, seed=3)
    tasks = TasksConfig(names=["rap_choice"], limit=2)
    settings = replace(evaluated.evaluate, text=text, tasks=tasks)
    again = replace(evaluated, name="again", evaluate=settings)
    evaluate(again, again.stage_dir("evaluate"))
    old = {(row.method, row.seed, row.cell): row for row in rows_of(evaluated)}
    new = rows_of(again)
    assert len(new) == len(old)
    for row in new:
        first = old[row.method, row.seed, row.cell]
        kept = ("levels", "evaluations", "calibration_delta_nll", "target_delta_nll", "fits")
        assert [getattr(row, name) for name in kept] == [getattr(first, name) for name in kept]
        assert len(row.window_delta_nll) == 4
        assert set(row.accuracies) == set(row.task_documents) == {"rap_choice"}
        assert row.accuracies_norm == {}  # generated tasks have none
        assert (row.flipped_answers_share == 0) >= (row.method == "dense")
        assert row.accuracy_above_chance is None or row.accuracy_above_chance_ci_low <= 1
        assert row.kl_divergence_mean != first.kl_divergence_mean or row.plan == Plan()
        depends = row.provenance["depends_on"]
        assert depends["report_sha256"] != first.provenance["depends_on"]["report_sha256"]
        assert depends["method"] == first.provenance["depends_on"]["method"]
    path = again.stage_dir("evaluate") / "results.jsonl"
    before = path.read_bytes()
    evaluate(again, path.parent)
    assert path.read_bytes() == before
