"""A short soak test of a tiny model, and its check of answers."""

import json

import pytest
from hydra import compose, initialize_config_dir

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("httpx", reason="httpx is not installed")

from experiments.config import as_config
from experiments.launch import CONF_DIR, register
from experiments.soak import check_answers, memory_growth, soak
from rap_env.plan import Plan
from rap_env.runtime.request_handle import EndEvent, RequestHandle, TokenEvent
from rap_env.runtime.sampling import SamplingParams
from tests.serving.tokenizers import chat_tokenizer
from tests.tiny import tiny_llm, tiny_model


@pytest.mark.slow
@pytest.mark.parametrize("random_plans", [True, False])
def test_a_short_soak_passes(tmp_path, random_plans):
    folder = tmp_path / "tiny"
    tiny_model(layers=4).save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    register()
    with initialize_config_dir(str(CONF_DIR), version_base=None):
        overrides = [
            "model=custom", f"model.name={folder}", "model.dtype=float32", "threads=1",
            "soak.meter=tensors", "soak.requests=150", "soak.max_minutes=1", "soak.clients=4",
            "soak.phase_s=0.1", "soak.rss_samples=5", "soak.rss_tolerance=1", "soak.hang_s=30",
            f"soak.out={tmp_path}/out/soak.jsonl", f"soak.random_plans={random_plans}",
            "serve.max_batch_size=4",
        ]  # fmt: skip
        soak(as_config(compose("soak", overrides=overrides)), tmp_path)
    (record,) = map(json.loads, (tmp_path / "out" / "soak.jsonl").read_text().splitlines())
    assert record["passed"], record["problems"]
    assert record["requests"] == 150 == sum(record["kinds"].values())
    assert set(record["kinds"]) == {"good", "bad", "cancel", "disconnect"}
    assert record["switches"] > 5
    assert record["masks"] > 2
    assert record["agreement"]["answers"] > 10
    assert record["agreement"]["control_wrong"] > 0
    decisions = (tmp_path / "decisions.jsonl").read_text().splitlines()
    assert len(decisions) == record["switches"]


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
            handle.emit(TokenEvent(token, float(logprobs[token]), 0.0, mask))
    handle.emit(EndEvent("length", None, 0.0))
    return handle


def test_agreement_detects_right_and_wrong_answers():
    llm = tiny_llm(layers=4)
    masks = [Plan(), Plan.removing(1, 4)]
    right = [answer_of(llm, mask, [5, 6, 7]) for mask in masks]
    counts = check_answers(llm, right)
    assert (counts["answers"], counts["tokens"]) == (2, 12)
    assert counts["wrong_answers"] == 0
    assert counts["control_wrong"] == counts["control_answers"] == 2
    wrong = answer_of(llm, masks[0], [5, 6, 7])
    wrong.plans = [masks[1]] * 6
    assert check_answers(llm, [wrong])["wrong_answers"] == 1


def test_growth_compares_the_second_tenth_with_the_last():
    assert memory_growth([50, *[100] * 18, 101]) == pytest.approx(0.005)
    assert memory_growth(list(range(100, 200))) == pytest.approx(194.5 / 114.5 - 1)
