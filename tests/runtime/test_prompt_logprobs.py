"""Log-probabilities of a prompt's tokens, as the engine delivers them."""

from __future__ import annotations

import pytest
import torch

from rap_env.plan import Plan
from rap_env.runtime.request_handle import PromptEvent, TokenEvent
from rap_env.runtime.sampling import SamplingParams
from tests.runtime.harness import Harness, greedy, prompt


def reading(count=3, top=2) -> SamplingParams:
    return SamplingParams(max_new_tokens=count, top_logprobs=top, prompt_logprobs=top)


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt", "mistral_sliding"])
def test_they_are_those_of_one_pass_over_the_prompt_whatever_the_chunks(name):
    harness = Harness(name=name)
    engine = harness.engine(prefill_chunk_tokens=4)
    ids = prompt(11)
    other, handle = engine.submit(prompt(6, 1), greedy(9)), engine.submit(ids, reading())
    harness.run(engine)
    with torch.no_grad():
        logits = harness.llm.model(torch.tensor([ids])).logits[0].float()
    expected = torch.log_softmax(logits, dim=-1)[:-1]
    assert [sample.token_id for sample in handle.prompt_samples] == ids[1:]
    found = torch.tensor([sample.logprob for sample in handle.prompt_samples])
    torch.testing.assert_close(found, expected.gather(1, torch.tensor(ids[1:])[:, None])[:, 0])
    likely = expected.topk(2)
    top = torch.tensor([[p for _, p in sample.top] for sample in handle.prompt_samples])
    torch.testing.assert_close(top, likely.values)
    assert [[token for token, _ in sample.top] for sample in handle.prompt_samples] == (
        likely.indices.tolist()
    )
    assert other.prompt_samples is None


def test_they_come_once_and_before_the_first_token_also_after_a_preemption():
    harness = Harness()
    engine = harness.engine(prefill_chunk_tokens=3)
    events = []
    handle = engine.submit(prompt(8), reading(5), events.append)
    for _ in range(2):
        engine.step()  # two of three chunks
    engine._scheduler._preempt()
    for _ in range(5):
        engine.step()
    assert handle.token_ids
    engine._scheduler._preempt()
    harness.run(engine)
    assert handle.preemptions == 2
    kinds = [type(e) for e in events if isinstance(e, PromptEvent | TokenEvent)]
    assert kinds == [PromptEvent, *[TokenEvent] * 5]
    assert len(handle.prompt_samples) == 7


def test_a_prompt_of_one_token_has_none():
    harness = Harness()
    engine = harness.engine()
    handle = engine.submit(prompt(1), reading())
    harness.run(engine)
    assert handle.prompt_samples == ()


def test_a_prompt_whose_logits_are_not_finite_fails_alone():
    harness = Harness(mask=Plan())
    engine = harness.engine()
    good = engine.submit(prompt(4), greedy(8))
    engine.step()
    head = harness.llm.model.get_output_embeddings()
    hook = head.register_forward_hook(
        lambda _m, _i, output: output * float("nan") if output.dim() == 2 else None
    )
    bad = engine.submit(prompt(5, 1), reading())
    harness.run(engine)
    hook.remove()
    assert (bad.reason, good.reason) == ("error", "length")
    assert "not finite" in bad.error
