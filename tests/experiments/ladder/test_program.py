"""The ladder on a tiny real model: plans, exact bytes, measured losses, resuming."""

from __future__ import annotations

from dataclasses import replace

import pytest

from experiments.config import Config
from experiments.config.common import TextConfig
from experiments.config.evaluation import EvaluateConfig
from experiments.config.ladder import LadderConfig
from experiments.config.model import ImportanceConfig, ModelConfig
from experiments.contexts import build_context, load_text
from experiments.errors import ExperimentError
from experiments.ladder.llama_cpp import gguf_file, llama_cpp
from experiments.ladder.plans import candidates, uniform_plans
from experiments.ladder.program import ladder
from experiments.ladder.records import LADDER_FILE, LadderRow, ShippedRow
from experiments.ladder.shipped import shipped
from experiments.ladder.summaries import read_ladder
from rap_env.blocks import BlockMask
from rap_env.errors import UnknownNameError
from rap_env.importance.level_scan import scan_levels
from rap_env.memory import MemoryModel
from rap_env.plan import CompressionPlan
from rap_env.request import Request
from rap_env.scoring.scorer import MaskScorer
from tests.tiny import tiny_model, tiny_tokenizer

LAYERS = 3


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    base = tmp_path_factory.mktemp("ladder")
    tiny_model(layers=LAYERS).save_pretrained(base / "model")
    tiny_tokenizer().save_pretrained(base / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAP_CACHE_DIR", str(base / "cache"))
        yield Config(
            stage="ladder", name="tiny", runs_dir=str(base / "runs"), progress=False, store=None,
            model=ModelConfig(name=str(base / "model"), device="cpu", dtype="float32"),
            calibration=TextConfig(source="self", windows=2, window_tokens=40, seed=9),
            importance=ImportanceConfig(method="none"),
            evaluate=EvaluateConfig(
                text=TextConfig(source="self", windows=3, window_tokens=44, seed=1)
            ),
            ladder=LadderConfig(
                requests=["1x48", "4x64"], weights=["native", "int4"], caches=["native", "int2"],
                removal="greedy_per_byte", removal_budgets=[0.9, 0.7], knapsack=None,
            ),
        )  # fmt: skip


@pytest.fixture(scope="module")
def rows(config):
    return LadderRow.read(ladder(config, config.stage_dir("ladder")))


def test_every_setting_and_budget_has_a_row_for_each_request(rows):
    found = [(row.method, row.name, row.shape) for row in rows]
    levels = [(w, c) for w in ("native", "int4") for c in ("native", "int2")]
    uniform = [("uniform", f"{weights} / {caches}") for weights, caches in levels]
    removal = [("removal", "90 %"), ("removal", "70 %")]
    expected = [(*name, shape) for shape in ((1, 48), (4, 64)) for name in (*uniform, *removal)]
    assert found == expected


def test_bytes_are_those_of_the_memory_model(rows, config):
    memory = MemoryModel(build_context(config).memory.facts)
    for row in rows:
        plan = CompressionPlan.of(row.levels)
        held = memory.breakdown(plan, Request(*row.shape, budget_bytes=2**40))
        assert row.peak_bytes == held.peak
        assert row.held_bytes == held.weights + held.embeddings + held.stubs + held.kv_cache
        assert row.fits == (row.budget_bytes is None or held.peak <= row.budget_bytes)
    assert {row.budget_bytes is None for row in rows if row.method == "uniform"} == {True}


def test_losses_are_those_of_the_scorer(rows, config):
    context = build_context(config)
    text = load_text(config.evaluate.text, "report", context.llm, progress=False)
    scorer = MaskScorer(context.llm, text)
    dense = scorer.window_nll(BlockMask())
    for row in rows:
        expected = scorer.window_nll(CompressionPlan.of(row.levels)) - dense
        assert row.window_losses == pytest.approx(expected.tolist(), abs=1e-9)
        assert row.loss_ci_low <= row.loss <= row.loss_ci_high
    assert [row.loss for row in rows if not row.levels] == [0.0, 0.0]
    assert all(row.loss != 0.0 for row in rows if row.name == "int4 / native")
    assert all(row.loss != 0.0 for row in rows if row.name == "native / int2")


def test_a_resumed_run_measures_nothing_again(rows, config, monkeypatch):
    path = config.stage_dir("ladder") / LADDER_FILE
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-2]) + lines[-1][:20])  # killed while it wrote a row
    measured = []
    scored = MaskScorer.window_nll
    monkeypatch.setattr(
        MaskScorer, "window_nll", lambda self, plan: measured.append(plan) or scored(self, plan)
    )
    again = LadderRow.read(ladder(config, config.stage_dir("ladder")))
    assert [row.window_losses for row in again] == [row.window_losses for row in rows]
    lowered = [plan for plan in measured if isinstance(plan, CompressionPlan)]
    assert len(lowered) == 2, "one for each missing row"


def test_levels_that_a_model_lacks_are_left_out(config):
    facts = build_context(config).memory.facts
    settings = LadderConfig(weights=["native", "int8", "int4"], caches=["native"])
    assert list(uniform_plans(settings, facts)) == [
        "native / native", "int8 / native", "int4 / native"
    ]  # fmt: skip
    lacking = replace(facts, int4_param_bytes=(0, *facts.int4_param_bytes[1:]))
    assert list(uniform_plans(settings, lacking)) == ["native / native", "int8 / native"]


def test_a_knapsack_lowers_precision_to_meet_its_budgets(config, tmp_path):
    context = build_context(config)
    costs = scan_levels(context.scorer, ["int8", "int4"], progress=False)
    costs.save(tmp_path / "tiny.levels.json")
    settings = replace(
        config.ladder,
        knapsack=str(tmp_path / "tiny.levels.json"),
        budgets=[0.95, 0.9],
        removal=None,
    )
    found = [c for c in candidates(settings, context) if c.method == "knapsack"]
    assert [c.name for c in found] == ["95 %", "90 %"] * 2
    for candidate in found:
        peak = context.memory.peak_bytes(candidate.plan, candidate.request)
        assert peak <= candidate.request.budget_bytes
        assert candidate.plan.weights or candidate.plan.caches, "precision comes first"


def test_packaged_policies_of_another_model_are_left_out(config, caplog):
    settings = replace(config.ladder, removal="frontier", knapsack=None)
    methods = {c.method for c in candidates(settings, build_context(config))}
    assert methods == {"uniform"}
    assert "packaged policy frontier" in caplog.text
    with pytest.raises(UnknownNameError):
        list(candidates(replace(settings, knapsack="missing.json"), build_context(config)))


def test_the_text_has_the_ladders_own_windows_if_there_are_any(config):
    text = config.evaluate.text
    assert config.ladder.text_of(text) == text
    shorter = replace(config.ladder, windows=2, window_tokens=20).text_of(text)
    assert (shorter.source, shorter.windows, shorter.window_tokens) == ("self", 2, 20)


def test_what_levels_cost_depends_on_how_weights_were_rounded(config):
    folder = config.stage_dir("shipped")
    rows = ShippedRow.read(shipped(replace(config, stage="shipped"), folder))
    by_name = {(row.what, row.level, row.rounding): row for row in rows}
    assert set(by_name) == {
        ("weights", "int8", "fitted"), ("weights", "int4", "fitted"),
        ("weights", "int4", "nearest"), ("weights", "int4", "calibrated"),
        ("embeddings", "int8", "fitted"), ("embeddings", "int4", "fitted"),
        ("caches", "int8", ""), ("caches", "int4", ""), ("caches", "int2", ""),
    }  # fmt: skip
    assert {row.shipped for row in rows} == {"float32"}
    losses = {row.loss for row in rows if (row.what, row.level) == ("weights", "int4")}
    assert len(losses) == 3, "each rounding gives other weights"
    facts = build_context(config).memory.facts
    fitted = by_name["weights", "int8", "fitted"]
    assert fitted.saved == pytest.approx(
        1 - sum(facts.int8_param_bytes) / sum(facts.block_param_bytes)
    )
    other = replace(config, stage="shipped", model=replace(config.model, dtype="bfloat16"))
    assert len(ShippedRow.read(shipped(other, folder))) == 2 * len(rows), "earlier rows stay"


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"caches": ["int3"]}, UnknownNameError),
        ({"weights": ["int2"]}, UnknownNameError),
        ({"requests": ["8"]}, ExperimentError),
        ({"llama_cpp_caches": ["q3_0"]}, UnknownNameError),
    ],
)
def test_an_impossible_setting_is_rejected(settings, error):
    with pytest.raises(error):
        LadderConfig(**settings)


def test_without_llama_cpp_the_program_says_what_to_install(config, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ExperimentError, match="pip install llama-cpp-py-sync=="):
        llama_cpp(config, tmp_path / "llama_cpp")
    assert not (tmp_path / "llama_cpp").exists()


def test_a_model_without_a_gguf_file_is_rejected(config, tmp_path):
    with pytest.raises(ExperimentError, match="GGUF"):
        gguf_file(config.model.name)
    with pytest.raises(ExperimentError, match="GGUF"):
        gguf_file(str(tmp_path / "missing.gguf"))


def test_records_are_found_by_the_report(rows, config):
    found = read_ladder(config.root)
    assert found
    assert found.ladder is not None
    assert found.ladder.shapes == [(1, 48), (4, 64)]
    assert not read_ladder(config.root / "nothing")
