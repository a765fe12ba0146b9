"""Cells outside the grid, and agents that propose several masks: on a tiny real model."""

import pytest

from experiments.compare import compare
from experiments.comparison.result_rows import ResultRow
from experiments.comparison.run_records import read_comparisons
from experiments.config.common import ImportanceConfig
from experiments.config.program_settings import CompareConfig, EvaluateConfig
from experiments.contexts import build_context, evaluation_cells, make_ladder_bytes
from experiments.evaluate import evaluate
from experiments.train import train
from rap_env.plan import Plan
from rap_env.request import Request
from tests.experiments.tiny_study import own_text, short_training, tiny_study


@pytest.fixture(scope="module")
def config(base):
    """Settings for a random model of four layers in a separate folder."""
    return tiny_study(
        base, stage="test", importance=ImportanceConfig(method="one_shot"),
        agent=short_training(32),
        evaluate=EvaluateConfig(
            requests=["2x32", "1x16"], budgets=[0.9], sparsities=[0.3, 0.1],
            outside=["4x48@0.75"], baselines=["greedy_per_byte", "one_shot"], best_of=[1, 4],
            text=own_text(),
        ),
    )  # fmt: skip


@pytest.fixture(scope="module")
def evaluated(config):
    train(config, config.stage_dir("train") / "rap-s0")
    evaluate(config, config.stage_dir("evaluate"))
    return config


def rows_of(config):
    return ResultRow.read(config.stage_dir("evaluate") / "results.jsonl")


def test_a_sparsity_is_a_share_of_all_blocks_at_the_shortest_request(config):
    ladder_bytes = make_ladder_bytes(config, build_context(config))
    memory = ladder_bytes.memory
    asked = evaluation_cells(config.evaluate, ladder_bytes)
    assert [one.part for one in asked] == ["grid"] * 2 + ["sparsity"] * 2 + ["outside"]
    for one in asked[2:4]:
        assert one.cell[:2] == (1, 16)
        blocks = sum(memory.facts.block_param_bytes)
        freed = memory.dense_peak_bytes(1, 16) - one.request.budget_bytes
        assert 0 <= freed - one.sparsity * blocks < 1
        assert one.cell[2] == one.request.budget_bytes / memory.dense_peak_bytes(1, 16)
    assert [one.sparsity for one in asked[2:4]] == [0.1, 0.3]
    assert asked[4].cell == (4, 48, 0.75)


def test_every_method_has_a_row_with_its_part_for_every_cell(evaluated):
    rows = rows_of(evaluated)
    methods = {"dense", "rap", "rap-best_of=4", "greedy_per_byte", "one_shot"}
    assert {row.method for row in rows} == methods
    parts = [(row.method, row.part) for row in rows]
    for method in methods:
        assert [parts.count((method, p)) for p in ("grid", "sparsity", "outside")] == [2, 2, 1]
    memory = build_context(evaluated).memory
    for row in rows:
        if row.method != "dense":
            assert row.fits
        if row.part == "sparsity" and row.fits:
            request = Request(1, 16, row.budget_bytes)
            freed = memory.freed_bytes(request)[list(Plan.removing(*row.mask).removed)].sum()
            assert freed >= 0.99 * row.sparsity * sum(memory.facts.block_param_bytes)


def test_best_of_masks_are_measured_and_no_worse(evaluated):
    rows = {(row.method, row.cell, row.part): row for row in rows_of(evaluated)}
    for (method, cell, part), row in rows.items():
        if method == "rap":
            best = rows["rap-best_of=4", cell, part]
            assert best.calibration_delta_nll <= row.calibration_delta_nll + 1e-6
            assert row.evaluations == 0
            assert best.evaluations <= 4
    assert any(row.evaluations > 1 for row in rows.values() if row.method == "rap-best_of=4")
    assert all(row.training_s > 0 for row in rows.values() if row.method.startswith("rap"))
    assert all(row.training_s is None for row in rows.values() if row.method == "one_shot")


def test_parts_are_compared_separately(evaluated):
    (records,) = read_comparisons([evaluated.root])
    assert list(records.parts) == ["grid", "sparsity", "outside"]
    assert [run.method for run in records.runs] == ["rap"]
    assert {row.sparsity for row in records.parts["sparsity"].rows} == {0.1, 0.3}
    assert records.comparison.learned == ["rap", "rap-best_of=4"]
    assert records.comparison.main_policy.method == "rap"
    text = compare(CompareConfig(runs=str(evaluated.root)))
    assert text.count("minus each other method") == 2 * 3
