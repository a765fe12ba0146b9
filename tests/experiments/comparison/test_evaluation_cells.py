"""Agents that propose several masks, beside baselines: on a tiny real model."""

from collections import Counter

import pytest

from experiments.compare import compare
from experiments.comparison.result_rows import ResultRow
from experiments.comparison.run_records import read_comparisons
from experiments.config.common import ImportanceConfig
from experiments.config.program_settings import CompareConfig, EvaluateConfig
from experiments.evaluate import evaluate
from experiments.train import train
from tests.experiments.tiny_study import own_text, short_training, tiny_study


@pytest.fixture(scope="module")
def config(base):
    """Settings for a random model of four layers in a separate folder."""
    return tiny_study(
        base, stage="test", importance=ImportanceConfig(method="one_shot"),
        agent=short_training(32),
        evaluate=EvaluateConfig(
            requests=["2x32", "1x16"], budgets=[0.9],
            baselines=["greedy_per_byte", "one_shot"], best_of=[1, 4], text=own_text(),
        ),
    )  # fmt: skip


@pytest.fixture(scope="module")
def evaluated(config):
    train(config, config.stage_dir("train") / "rap-s0")
    evaluate(config, config.stage_dir("evaluate"))
    return config


def rows_of(config):
    return ResultRow.read(config.stage_dir("evaluate") / "results.jsonl")


def test_best_of_masks_are_measured_and_no_worse(evaluated):
    rows = {(row.method, row.cell): row for row in rows_of(evaluated)}
    methods = {"dense", "rap", "rap-best_of=4", "greedy_per_byte", "one_shot"}
    assert Counter(method for method, _ in rows) == dict.fromkeys(methods, 2)
    for (method, cell), row in rows.items():
        if method == "rap":
            best = rows["rap-best_of=4", cell]
            assert best.calibration_delta_nll <= row.calibration_delta_nll + 1e-6
            assert row.evaluations == 0
            assert best.evaluations <= 4
    assert any(row.evaluations > 1 for row in rows.values() if row.method == "rap-best_of=4")
    assert all(row.training_s > 0 for row in rows.values() if row.method.startswith("rap"))
    assert all(row.training_s is None for row in rows.values() if row.method == "one_shot")


def test_trained_methods_are_compared_with_all_others(evaluated):
    (records,) = read_comparisons([evaluated.root])
    assert [run.method for run in records.runs] == ["rap"]
    assert records.comparison.learned == ["rap", "rap-best_of=4"]
    text = compare(CompareConfig(runs=str(evaluated.root)))
    assert text.count("minus each other method") == 2
