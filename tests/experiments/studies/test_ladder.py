"""The ladder on a tiny real model: plans, exact bytes, measured losses, llama.cpp's caches."""

from dataclasses import replace
from pathlib import Path

import pytest

from experiments.config.program_settings import EvaluateConfig
from experiments.config.study_settings import LadderConfig
from experiments.contexts import build_context, load_text
from experiments.studies import ladder
from experiments.studies.ladder import CACHES, STUDY, WEIGHTS, LadderRow, ladder_jobs
from experiments.study.console import ExperimentError
from rap_env.errors import InvalidRequestError
from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.request import Request
from rap_env.scoring.scorer import PlanScorer
from tests.experiments.tiny_study import own_text, tiny_study


@pytest.fixture(scope="module")
def config(base):
    return tiny_study(
        base, layers=3, stage="ladder", store=None,
        calibration=own_text(2, 40, 9),
        evaluate=EvaluateConfig(text=own_text(3, 44, 1)),
        ladder=LadderConfig(requests=["1x48", "4x64"]),
    )  # fmt: skip


@pytest.fixture(scope="module")
def scorer(config):
    context = build_context(config)
    text = load_text(config.evaluate.text, "report", context.llm, progress=False)
    return PlanScorer(context.llm, text)


def test_every_setting_is_measured_for_each_request(config, scorer):
    rows = LadderRow.read(STUDY.run(config, config.stage_dir("ladder")))
    names = [f"{weights} / {caches}" for weights in WEIGHTS for caches in CACHES]
    assert [(row.name, row.shape) for row in rows] == [
        (name, shape) for shape in ((1, 48), (4, 64)) for name in names
    ]
    memory, native = MemoryModel(scorer.llm), scorer.window_nll(Plan())
    for row in rows:
        plan = Plan.of(row.depends_on["plan"])
        sizes = memory.breakdown(plan, Request(*row.shape, budget_bytes=2**40))
        assert row.held_bytes == sizes.weights + sizes.embeddings + sizes.kv_cache
        rise = scorer.window_nll(plan) - native
        assert row.window_delta_nll == pytest.approx(rise.tolist(), abs=1e-9)
        assert row.delta_nll_ci_low <= row.delta_nll <= row.delta_nll_ci_high
    assert "| float32 / int2 |" in (config.stage_dir("ladder") / "tables.md").read_text()
    long = replace(config, ladder=LadderConfig(requests=["1x100000"]))
    with pytest.raises(InvalidRequestError):
        list(ladder_jobs(long, config.stage_dir("ladder")))


class FakeLlamaCpp:
    """An engine that gives every token the same NLL."""

    model_bytes = 1000

    def __init__(self, path, cache, rows, tokens, threads):
        assert path.endswith("model.gguf")
        self.buffers = {"KV": rows * tokens * (2 if cache == "q8_0" else 4), "compute": 7}
        self.nll = lambda window: 3.0 if cache == "q8_0" else 2.0
        self.close = lambda: None


def test_caches_of_llama_cpp_stand_beside_them(config, scorer, tmp_path, monkeypatch):
    settings = replace(config.ladder, llama_cpp_caches=["f16", "q8_0"])
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
