"""The ladder on a tiny real model: plans, exact bytes, measured losses, llama.cpp's caches."""

from dataclasses import replace
from pathlib import Path

import pytest

from experiments.config.program_settings import EvaluateConfig
from experiments.config.study_settings import LadderConfig
from experiments.contexts import build_context, load_text
from experiments.studies import ladder
from experiments.studies.ladder import STUDY, LadderRow, ladder_jobs
from experiments.study.console import ExperimentError
from experiments.study.table_format import TIMES
from rap_env.errors import UnknownNameError
from rap_env.importance.level_scan import scan_levels
from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.request import Request
from rap_env.scoring.scorer import MaskScorer
from tests.experiments.tiny_study import own_text, tiny_study


@pytest.fixture(scope="module")
def config(base):
    return tiny_study(
        base, layers=3, stage="ladder", store=None,
        calibration=own_text(2, 40, 9),
        evaluate=EvaluateConfig(text=own_text(3, 44, 1)),
        ladder=LadderConfig(
            requests=["1x48", "4x64"], weights=["native", "int4", "int3"],
            caches=["native", "int2"], removing_policy="greedy_per_byte",
            removal_budgets=[0.9, 0.7], knapsack=None,
        ),
    )  # fmt: skip


@pytest.fixture(scope="module")
def scorer(config):
    context = build_context(config)
    text = load_text(config.evaluate.text, "report", context.llm, progress=False)
    return MaskScorer(context.llm, text)


def test_every_setting_and_budget_is_measured_for_each_request(config, scorer):
    rows = LadderRow.read(STUDY.run(config, config.stage_dir("ladder")))
    settings = [("uniform", f"{w} / {c}") for w in ("native", "int4") for c in ("native", "int2")]
    methods = [*settings, ("removal", "90 %"), ("removal", "70 %")]  # the model has no int3
    assert [(row.method, row.name, row.shape) for row in rows] == [
        (*method, shape) for shape in ((1, 48), (4, 64)) for method in methods
    ]
    memory = MemoryModel(scorer.llm)
    for row in rows:
        plan = Plan.of(row.levels)
        sizes = memory.breakdown(plan, Request(*row.shape, budget_bytes=2**40))
        assert row.held_bytes == sizes.weights + sizes.embeddings + sizes.kv_cache
        native = memory.peak_bytes(Plan(), Request(*row.shape, budget_bytes=2**40))
        share = 1.0 if row.method == "uniform" else int(row.name[:-2]) / 100
        assert row.fits == (sizes.peak <= share * native)
        rise = scorer.window_nll(plan) - scorer.window_nll(Plan())
        assert row.window_delta_nll == pytest.approx(rise.tolist(), abs=1e-9)
        assert row.delta_nll_ci_low <= row.delta_nll <= row.delta_nll_ci_high
        assert (row.delta_nll == 0.0) == (row.name == "native / native")
    tables = (config.stage_dir("ladder") / "tables.md").read_text()
    assert "| float32 / int2 |" in tables
    assert f"1 {TIMES} 48, 90 % |" in tables


def test_a_knapsack_lowers_precision_to_meet_its_budgets(config, scorer, tmp_path):
    costs = scan_levels(scorer, ["int8", "int4"], progress=False)
    costs.save(tmp_path / "tiny.levels.json")
    settings = replace(
        config.ladder,
        knapsack=str(tmp_path / "tiny.levels.json"),
        budgets=[0.95, 0.9],
        removing_policy=None,
    )
    jobs = ladder_jobs(replace(config, ladder=settings), tmp_path)
    rows = [job.make() for job in jobs if job.identity[0] == "knapsack"]
    assert [row.name for row in rows] == ["95 %", "90 %"] * 2
    for row in rows:
        assert row.fits
        assert set(row.levels.values()) & {"int8", "int4"}, "precision comes first"


class FakeLlamaCpp:
    """An engine that gives every token the same NLL."""

    model_bytes = 1000

    def __init__(self, path, cache, rows, tokens, threads):
        assert path.endswith("model.gguf")
        self.buffers = {"KV": rows * tokens * (2 if cache == "q8_0" else 4), "compute": 7}
        self.nll = lambda window: 3.0 if cache == "q8_0" else 2.0
        self.close = lambda: None


def test_caches_of_llama_cpp_stand_beside_them(config, scorer, tmp_path, monkeypatch):
    settings = replace(config.ladder, llama_cpp_caches=["f16", "q8_0"], removing_policy=None)
    config = replace(config, name="llama", ladder=settings)
    with pytest.raises(ExperimentError, match="reads a GGUF file"):
        STUDY.run(config, tmp_path)
    monkeypatch.setattr(ladder, "gguf_file", lambda model: Path("model.gguf"))
    monkeypatch.setattr("experiments.llama_cpp.PACKAGE", "not-installed")
    with pytest.raises(ExperimentError, match="pip install not-installed=="):
        STUDY.run(config, tmp_path)
    monkeypatch.setattr(ladder, "need_llama_cpp", lambda: "0.1")
    monkeypatch.setattr(ladder, "LlamaCpp", FakeLlamaCpp)
    read = LadderRow.read(STUDY.run(config, tmp_path))
    rows = {(row.name, row.shape): row for row in read if row.method == "llama.cpp"}
    assert rows["f16", (1, 48)].held_bytes == 1000 + 48 * 4
    assert rows["q8_0", (4, 64)].held_bytes == 1000 + 4 * 64 * 2
    rise = 3.0 - scorer.window_nll(Plan())
    assert rows["q8_0", (4, 64)].window_delta_nll == pytest.approx(rise.tolist())
    assert "| llama.cpp: q8_0 |" in (tmp_path / "tables.md").read_text()


def test_packaged_policies_of_another_model_are_left_out(config, caplog):
    settings = replace(config.ladder, removing_policy="frontier", knapsack=None)
    jobs = ladder_jobs(replace(config, ladder=settings), Path())
    assert {job.identity[0] for job in jobs} == {"uniform"}
    assert "packaged policy frontier" in caplog.text
    missing = replace(config, ladder=replace(settings, knapsack="missing.json"))
    with pytest.raises(UnknownNameError):
        list(ladder_jobs(missing, Path()))
