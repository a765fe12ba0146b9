"""Levels and llama.cpp's files at equal bytes, on a tiny real model."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from experiments.config.program_settings import EvaluateConfig
from experiments.config.study_settings import EqualBytesConfig
from experiments.contexts import build_context, load_text
from experiments.studies import equal_bytes
from experiments.studies.equal_bytes import STUDY, EqualBytesRow
from experiments.study.logits import window_logits
from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.request import Request
from rap_env.scoring.native_agreement import AgreementScorer
from tests.experiments.tiny_study import own_text, tiny_study

LAYERS = 3


@pytest.fixture(scope="module")
def config(base):
    return tiny_study(
        base, layers=LAYERS, stage="equal_bytes", store=None,
        calibration=own_text(2, 40, 9),
        evaluate=EvaluateConfig(text=own_text(3, 44, 1)),
        equal_bytes=EqualBytesConfig(request="1x48"),
    )  # fmt: skip


def test_losses_and_agreement_are_those_of_the_scorer(config):
    rows = EqualBytesRow.read(STUDY.run(config, config.stage_dir("equal_bytes")))
    names = ["as shipped", "FFN int8", "int8", "FFN int4", "int4"]
    assert [(row.method, row.name) for row in rows] == [("uniform", name) for name in names]
    context = build_context(config)
    text = load_text(config.evaluate.text, "report", context.llm, progress=False)
    scorer, memory = AgreementScorer(context.llm, text), MemoryModel(context.llm)
    for row in rows:
        plan = Plan.of(row.levels)
        rise = scorer.window_nll(plan) - scorer.window_nll(Plan())
        assert row.window_delta_nll == pytest.approx(rise.tolist(), abs=1e-5)
        agreement = scorer.agreement(plan)
        assert row.kl_divergence_mean == pytest.approx(agreement.kl_divergence_mean, abs=1e-6)
        assert row.kl_divergence_p99 == pytest.approx(agreement.kl_divergence_p99, abs=1e-5)
        assert row.same_top_token_share == agreement.same_top_token_share
        sizes = memory.breakdown(plan, Request(1, 1, 2**40))
        assert row.weight_bytes == sizes.weights + sizes.embeddings
    assert "one level: FFN int8" in (config.stage_dir("equal_bytes") / "tables.md").read_text()


@pytest.mark.parametrize("kind", ["as shipped", "IQ2_M+embeddings"])
def test_a_file_is_quantised_with_the_mean_squares_of_inputs(config, kind, tmp_path, monkeypatch):
    llm, orders, opened = build_context(config).llm, [], []
    calibration = torch.randint(4, 40, (2, 40), generator=torch.Generator().manual_seed(0))
    source = tmp_path / "source.gguf"

    class FakeLlamaCpp:
        """The unquantised model, in two parts."""

        model_bytes, tensor_types = 5, {"q4_0": 2}

        def __init__(self, path, cache, rows, tokens, threads):
            opened.append((path, cache, rows, tokens))
            self.close = lambda: None

        def logits(self, window):
            logits = window_logits(llm, Plan(), torch.tensor(window)).numpy()
            return [(logits[:30], window[1:31]), (logits[30:], window[31:])]

    monkeypatch.setattr(equal_bytes, "calibration_windows", lambda llm: calibration)
    monkeypatch.setattr(equal_bytes, "gguf_file", lambda model: source)
    monkeypatch.setattr(equal_bytes, "need_llama_cpp", lambda: "0.1")
    monkeypatch.setattr(equal_bytes, "write_quantised_file", lambda *order: orders.append(order))
    monkeypatch.setattr(equal_bytes, "LlamaCpp", FakeLlamaCpp)
    settings = replace(config.equal_bytes, llama_cpp_files=[kind])
    job = next(iter(equal_bytes.equal_bytes_jobs(replace(config, equal_bytes=settings), tmp_path)))
    row = job.make()
    assert (row.method, row.name, row.weight_bytes) == ("llama.cpp", kind, 5)
    assert (row.delta_nll, row.same_top_token_share) == (0.0, 1.0)
    assert row.tensor_types == {"q4_0": 2}
    assert opened[0][1:] == ("f16", 1, 44)
    if kind == "as shipped":
        assert opened[0][0] == str(source)
        assert not orders
        return
    ((read, written, asked, importance),) = orders
    assert (read, str(written), asked) == (source, opened[0][0], kind)
    parts = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    names = [f"blk.{layer}.{part}.weight" for layer in range(LAYERS) for part in parts]
    assert sorted(importance) == sorted(names)
    layer = llm.adapter.layers(llm.model)[0]
    states = layer.input_layernorm(llm.model.get_input_embeddings()(calibration))
    expected = states.detach().flatten(0, 1).square().mean(dim=0).numpy()
    assert np.array(importance["blk.0.attn_q.weight"]) == pytest.approx(expected, rel=1e-4)
