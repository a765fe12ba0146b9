"""The ladder on a tiny real model: plans, exact bytes, measured losses, resuming."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from experiments.config.evaluation_settings import EvaluateConfig
from experiments.config.study_settings import LadderConfig
from experiments.contexts import build_context, load_text
from experiments.ladder.level_costs_by_model import STUDY as LEVEL_COSTS
from experiments.ladder.level_costs_by_model import LevelCostRow, with_start
from experiments.ladder.llama_cpp import STUDY as LLAMA_CPP
from experiments.ladder.llama_cpp import gguf_file
from experiments.ladder.loss_against_bytes import STUDY, LadderRow, ladder_jobs, uniform_settings
from experiments.study.experiment_errors import ExperimentError
from rap_env.errors import UnknownNameError
from rap_env.importance.level_scan import scan_levels
from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.request import Request
from rap_env.scoring.scorer import MaskScorer
from tests.experiments.tiny_study import own_text, tiny_study

LAYERS = 3


@pytest.fixture(scope="module")
def config(base):
    return tiny_study(
        base, layers=LAYERS, stage="ladder", store=None,
        calibration=own_text(2, 40, 9),
        evaluate=EvaluateConfig(text=own_text(3, 44, 1)),
        ladder=LadderConfig(
            requests=["1x48", "4x64"], weights=["native", "int4"], caches=["native", "int2"],
            removing_policy="greedy_per_byte", removal_budgets=[0.9, 0.7], knapsack=None,
        ),
    )  # fmt: skip


@pytest.fixture(scope="module")
def rows(config):
    return LadderRow.read(STUDY.run(config, config.stage_dir("ladder")))


def test_every_setting_and_budget_has_a_row_for_each_request(rows):
    measured = [(row.method, row.name, row.shape) for row in rows]
    levels = [(w, c) for w in ("native", "int4") for c in ("native", "int2")]
    uniform = [("uniform", f"{weights} / {caches}") for weights, caches in levels]
    removal = [("removal", "90 %"), ("removal", "70 %")]
    expected = [(*name, shape) for shape in ((1, 48), (4, 64)) for name in (*uniform, *removal)]
    assert measured == expected


def test_bytes_are_those_of_the_memory_model(rows, config):
    memory = MemoryModel(build_context(config).memory.facts)
    for row in rows:
        plan = Plan.of(row.levels)
        held = memory.breakdown(plan, Request(*row.shape, budget_bytes=2**40))
        assert row.peak_bytes == held.peak
        assert row.held_bytes == held.weights + held.embeddings + held.kv_cache
        assert row.fits == (row.budget_bytes is None or held.peak <= row.budget_bytes)
    assert {row.budget_bytes is None for row in rows if row.method == "uniform"} == {True}


def test_losses_are_those_of_the_scorer(rows, config):
    context = build_context(config)
    text = load_text(config.evaluate.text, "report", context.llm, progress=False)
    scorer = MaskScorer(context.llm, text)
    dense = scorer.window_nll(Plan())
    for row in rows:
        expected = scorer.window_nll(Plan.of(row.levels)) - dense
        assert row.window_delta_nll == pytest.approx(expected.tolist(), abs=1e-9)
        assert row.delta_nll_ci_low <= row.delta_nll <= row.delta_nll_ci_high
    assert [row.delta_nll for row in rows if not row.levels] == [0.0, 0.0]
    assert all(row.delta_nll != 0.0 for row in rows if row.name == "int4 / native")
    assert all(row.delta_nll != 0.0 for row in rows if row.name == "native / int2")


def test_levels_that_a_model_lacks_are_left_out(config):
    facts = build_context(config).memory.facts
    settings = LadderConfig(weights=["native", "int8", "int4"], caches=["native"])
    assert list(uniform_settings(settings, facts)) == [
        "native / native", "int8 / native", "int4 / native"
    ]  # fmt: skip
    blocks = facts.level_param_bytes
    lacking = replace(facts, level_param_bytes={**blocks, "int4": (0, *blocks["int4"][1:])})
    assert list(uniform_settings(settings, lacking)) == ["native / native", "int8 / native"]


def test_a_knapsack_lowers_precision_to_meet_its_budgets(config, tmp_path):
    context = build_context(config)
    costs = scan_levels(context.scorer, ["int8", "int4"], progress=False)
    costs.save(tmp_path / "tiny.levels.json")
    settings = replace(
        config.ladder,
        knapsack=str(tmp_path / "tiny.levels.json"),
        budgets=[0.95, 0.9],
        removing_policy=None,
    )
    jobs = [
        job for job in ladder_jobs(replace(config, ladder=settings), tmp_path)
        if job.identity[0] == "knapsack"
    ]  # fmt: skip
    assert [job.identity[1] for job in jobs] == ["95 %", "90 %"] * 2
    for job in jobs:
        row = job.make()
        assert row.fits
        assert row.peak_bytes <= row.budget_bytes
        assert set(row.levels.values()) & {"int8", "int4"}, "precision comes first"


def test_packaged_policies_of_another_model_are_left_out(config, caplog):
    settings = replace(config.ladder, removing_policy="frontier", knapsack=None)
    jobs = ladder_jobs(replace(config, ladder=settings), Path())
    assert {job.identity[0] for job in jobs} == {"uniform"}
    assert "packaged policy frontier" in caplog.text
    missing = replace(config, ladder=replace(settings, knapsack="missing.json"))
    with pytest.raises(UnknownNameError):
        list(ladder_jobs(missing, Path()))


def test_what_levels_cost_depends_on_how_weights_were_rounded(config):
    config = replace(config, stage="level_costs_by_model")
    folder = config.stage_dir(config.stage)
    rows = LevelCostRow.read(LEVEL_COSTS.run(config, folder))
    by_name = {(row.what, row.level, row.rounding): row for row in rows}
    assert set(by_name) == {
        ("weights", "int8", "fitted"), ("weights", "int4", "fitted"),
        ("weights", "int4", "nearest"), ("weights", "int4", "calibrated"),
        ("embeddings", "int8", "fitted"), ("embeddings", "int4", "fitted"),
        ("caches", "int8", ""), ("caches", "int4", ""), ("caches", "int2", ""),
    }  # fmt: skip
    assert {row.shipped_format for row in rows} == {"float32"}
    sizes = [by_name["weights", level, "fitted"].lowered_bytes for level in ("int8", "int4")]
    assert sizes == sorted(sizes, reverse=True)
    assert by_name["caches", "int2", ""].lowered_bytes == 0
    losses = {row.delta_nll for row in rows if (row.what, row.level) == ("weights", "int4")}
    assert len(losses) == 3, "each rounding gives other weights"
    other = replace(config, model=replace(config.model, dtype="bfloat16"))
    both = LevelCostRow.read(LEVEL_COSTS.run(other, folder))
    assert len(both) == 2 * len(rows), "earlier rows stay"


def test_windows_begin_with_the_start_token_if_the_tokenizer_adds_one(config):
    llm, tokens = build_context(config).llm, torch.arange(12).view(2, 6)
    assert with_start(llm, tokens) is tokens
    fake = SimpleNamespace(tokenizer=Mock(return_value={"input_ids": [1, 7]}, bos_token_id=1))
    assert with_start(fake, tokens).tolist() == [[1, 0, 1, 2, 3, 4], [1, 6, 7, 8, 9, 10]]


def test_without_llama_cpp_the_program_says_what_to_install(config, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ExperimentError, match="pip install llama-cpp-py-sync=="):
        LLAMA_CPP.run(config, tmp_path)
    assert not (tmp_path / "llama_cpp.jsonl").exists()


def test_a_model_without_a_gguf_file_is_rejected(config, tmp_path):
    with pytest.raises(ExperimentError, match="GGUF"):
        gguf_file(config.model.name)
    with pytest.raises(ExperimentError, match="GGUF"):
        gguf_file(str(tmp_path / "missing.gguf"))
