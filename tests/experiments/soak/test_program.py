"""A short soak test of a tiny model, and its checks."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hydra import compose, initialize_config_dir

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("httpx", reason="httpx is not installed")

from experiments.config import as_config
from experiments.launch import CONF_DIR, register
from experiments.soak.harness import SoakHarness
from experiments.soak.invariants import check_answers, memory_growth
from experiments.soak.program import soak, summary
from experiments.soak.recording import Answer, AnswerSample, SoakState
from rap_env.blocks import BlockMask
from rap_env.plan import CompressionPlan
from rap_env.runtime.request_handle import EndEvent, RequestHandle, TokenEvent
from rap_env.runtime.sampling import SamplingParams
from tests.serving.tokenizers import chat_tokenizer
from tests.tiny import tiny_llm, tiny_model


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_model(layers=4).save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    return folder


def config(folder, *overrides):
    register()
    with initialize_config_dir(str(CONF_DIR), version_base=None):
        given = [
            "model=custom", f"model.name={folder}", "model.dtype=float32", "threads=1",
            "soak.meter=tensors", "soak.requests=150", "soak.max_minutes=1", "soak.clients=4",
            "soak.phase_s=0.1", "soak.rss_samples=5", "soak.rss_tolerance=1", "soak.hang_s=30",
            "serve.max_batch_size=4", *overrides,
        ]  # fmt: skip
        return as_config(compose("soak", overrides=given))


@pytest.mark.slow
def test_a_short_soak_passes(model_folder, tmp_path):
    settings = config(model_folder)
    out = tmp_path / "out" / "soak.jsonl"
    settings = replace(settings, soak=replace(settings.soak, out=str(out)))
    soak(settings, tmp_path)
    (record,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert record["passed"], record["problems"]
    assert record["requests"] == 150 == sum(record["kinds"].values())
    assert set(record["kinds"]) == {"good", "bad", "cancel", "disconnect", "look"}
    assert record["switches"] > 5
    assert record["masks"] > 2
    assert record["agreement"]["answers"] > 10
    assert record["agreement"]["control_wrong"] > 0
    assert record["answers"]["cancelled"] > 0
    assert "All checks passed" in summary(record)
    decisions = [json.loads(line) for line in (tmp_path / "decisions.jsonl").open()]
    assert len(decisions) == record["switches"]


@pytest.mark.slow
def test_a_wrong_answer_fails_the_soak(model_folder, tmp_path, monkeypatch):
    note = AnswerSample.note

    def altered(self, handle):
        emit = handle.emit
        handle.emit = lambda event: emit(
            replace(event, token_id=7) if isinstance(event, TokenEvent) else event
        )
        note(self, handle)

    monkeypatch.setattr(AnswerSample, "note", altered)
    record = SoakHarness(
        config(model_folder, "soak.requests=40", "soak.bad_share=0"), tmp_path
    ).run()
    assert not record["passed"]
    assert not record["checks"]["sample_agrees"]
    assert "FAILED" in summary(record)


def answer_of(llm, mask, prompt, tokens=6):
    """What a plain model generates under a mask."""
    import torch

    handle = RequestHandle(tuple(prompt), SamplingParams(max_new_tokens=tokens), 0.0)
    ids = list(prompt)
    with llm.masked(mask), torch.no_grad():
        for _ in range(tokens):
            logprobs = llm.model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            token = int(logprobs.argmax())
            ids.append(token)
            handle.emit(TokenEvent(token, float(logprobs[token]), 0.0, CompressionPlan(mask)))
    handle.emit(EndEvent("length", None, 0.0))
    return Answer.of(handle)


def test_agreement_detects_right_and_wrong_answers():
    llm = tiny_llm(layers=4)
    masks = [BlockMask(), BlockMask.of(1, 4)]
    right = [answer_of(llm, mask, [5, 6, 7]) for mask in masks]
    found = check_answers(llm, right)
    assert (found.answers, found.tokens, found.masks) == (2, 12, 2)
    assert found.wrong_answers == found.wrong_tokens == 0
    assert found.worst_logprob < 1e-4
    assert found.control_wrong == found.control_answers == 2
    wrong = answer_of(llm, masks[0], [5, 6, 7])
    assert check_answers(llm, [replace(wrong, plan=CompressionPlan(masks[1]))]).wrong_answers == 1


def test_growth_compares_the_second_tenth_with_the_last():
    assert memory_growth([1, 2]) == 0
    flat = [50, *[100] * 18, 101]
    assert memory_growth(flat) == pytest.approx(0.005)
    assert memory_growth(list(range(100, 200))) == pytest.approx(194.5 / 114.5 - 1)


def test_the_sample_is_bounded_and_leaves_out_changed_masks():
    sample = AnswerSample(size=10)
    for number in range(500):
        handle = RequestHandle((number,), SamplingParams(), 0.0)
        masks = [BlockMask(), BlockMask.of(number % 2)] if number % 5 else [BlockMask()]
        for mask in masks:
            handle.emit(TokenEvent(5, -0.5, 0.0, CompressionPlan(mask)))
        handle.emit(EndEvent("length", None, 0.0))
        sample.note(handle)
    assert sample.unfinished() == []
    assert sample.eligible == 100
    assert sample.changed == 400
    assert len(sample.kept) == 10
    assert max(answer.prompt_ids[0] for answer in sample.kept) > 100


def test_clients_pause_on_request():
    state = SoakState(2)
    assert state.next_number() == 0
    with state.paused(0.05) as idle:
        assert not idle
    state.finished("good", "ok")
    with state.paused(0.05) as idle:
        assert idle
    assert state.next_number() == 1
    assert state.next_number() is None
