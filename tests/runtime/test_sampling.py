"""Sampled tokens, and log-probabilities of answers and prompts."""

import math

import pytest
import torch

from rap_env.errors import InvalidRequestError
from rap_env.runtime.request_handle import TokenEvent
from rap_env.runtime.sampling import RowSampler, SamplingParams, sample_rows
from tests.runtime.harness import Harness, greedy, preempt, prompt, steps


def logits(rows=3, vocab=50, seed=0) -> torch.Tensor:
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def tokens(scores, count=3, **settings) -> list[int]:
    """Tokens that one row draws one after another."""
    sampler = RowSampler(SamplingParams(**settings))
    return [sample_rows([sampler], scores)[0].token_id for _ in range(count)]


def sampled(**settings) -> SamplingParams:
    return SamplingParams(temperature=settings.pop("temperature", 1.0), **settings)


def test_unlikely_and_repeated_tokens_are_drawn_less():
    scores = torch.full((1, 50), -50.0)
    scores[0, :3] = torch.tensor([2.0, 1.9, 0.5])
    assert set(tokens(scores, 99, temperature=1.0, min_p=0.5)) == {0, 1}
    assert tokens(scores, 3, repetition_penalty=1.2) == [0, 1, 0]
    scores[0] = -scores[0]  # negative logits are multiplied: 3 to 49 are equal and highest
    seen = RowSampler(SamplingParams(repetition_penalty=2.0), prompt_ids=[3, 4])
    assert sample_rows([seen], scores)[0].token_id == 5


def test_no_stop_token_is_drawn_before_the_least_tokens():
    stops = {"stop_token_ids": (0, 99), "min_tokens": 2, "logit_bias": ((0, 100.0),)}
    assert 0 not in (drawn := tokens(logits(1), 3, **stops))[:2]
    assert drawn[2] == 0


@pytest.mark.parametrize(
    ("setting", "wrong"),
    [
        ("max_new_tokens", 1.5),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_k", -1),
        ("seed", "x"),
        ("presence_penalty", 2.5),
        ("logit_bias", ((-1, 1.0),)),
        ("top_logprobs", 0.5),
    ],
)
def test_values_out_of_range_are_rejected_by_name(setting, wrong):
    with pytest.raises(InvalidRequestError, match=f"{setting} must be"):
        SamplingParams(**{setting: wrong})


def test_samples_of_a_row_do_not_depend_on_other_rows():
    scores, others = logits(), logits(seed=9)
    lone = RowSampler(sampled(seed=5))
    among = [RowSampler(sampled(seed=1)), RowSampler(sampled(seed=5)), RowSampler(SamplingParams())]
    for step in range(20):
        mixed = torch.roll(others, step, dims=1)
        mixed[1] = scores[step % 3]
        assert sample_rows(among, mixed)[1] == sample_rows([lone], scores[step % 3][None])[0]


def test_a_seed_repeats_samples_and_no_seed_does_not():
    first, again, other, *free = (
        tokens(torch.zeros(1, 1000), 8, temperature=1.0, seed=seed)
        for seed in (4, 4, 5, None, None)
    )
    assert first == again != other
    assert free[0] != free[1]


def test_top_k_and_top_p_limit_the_sampled_tokens():
    scores = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    cases = (({"top_k": 2}, {0, 1}), ({"top_p": 0.75}, {0, 1}), ({"top_k": 1}, {0}))
    for bound, allowed in cases:
        assert set(tokens(scores, 200, temperature=1.0, seed=0, **bound)) == allowed, bound


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_with_logits_that_are_not_finite_has_no_sample_and_other_rows_do(bad):
    scores = logits()
    scores[1, 7] = bad
    drawn = sample_rows(
        [RowSampler(SamplingParams()), RowSampler(sampled()), RowSampler(sampled())], scores
    )
    assert drawn[1] is None
    assert drawn[0] is not None
    assert drawn[2] is not None
    scores[1, 3:] = -math.inf  # no error
    assert tokens(scores[1][None], 1, temperature=1.0, seed=0)[0] < 3


def test_penalties_lower_the_logits_of_tokens_that_the_answer_has():
    scores = torch.tensor([[3.0, 2.2, 1.9, 0.0]])
    assert tokens(scores) == [0, 0, 0]
    assert tokens(scores, presence_penalty=1.0) == [0, 1, 0]  # 2.0, 1.2, 1.9: once each
    assert tokens(scores, 5, frequency_penalty=0.9) == [0, 1, 0, 2, 1]
    assert tokens(scores, presence_penalty=-1.0) == [0, 0, 0]


def test_a_bias_is_added_and_its_row_alone_changes():
    scores = logits()
    biased = RowSampler(SamplingParams(logit_bias=((7, 100.0), (8, 80.0))))
    plain = RowSampler(SamplingParams())
    before = scores.clone()
    drawn = sample_rows([plain, biased, plain], scores)
    assert drawn[1].token_id == 7
    assert [drawn[0], drawn[2]] == [sample_rows([plain], before[row][None])[0] for row in (0, 2)]
    assert torch.equal(scores, before)


def test_log_probabilities_are_those_before_penalties_bias_and_temperature():
    scores = logits(1)
    sampler = RowSampler(sampled(temperature=2.0, logit_bias=((4, 100.0),), top_logprobs=3))
    drawn = sample_rows([sampler], scores)[0]
    expected = torch.log_softmax(scores[0], dim=-1)
    assert drawn.token_id == 4
    assert drawn.logprob == pytest.approx(float(expected[4]), abs=1e-5)
    assert [token for token, _ in drawn.top] == scores[0].topk(3).indices.tolist()


def reading(count=3, top=2) -> SamplingParams:
    return SamplingParams(max_new_tokens=count, top_logprobs=top, prompt_logprobs=True)


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt", "mistral_sliding"])
def test_log_probabilities_are_those_of_one_pass_of_the_model_whatever_the_chunks(name):
    harness = Harness(name=name)
    engine = harness.engine(prefill_chunk_tokens=4)
    ids = prompt(11)
    other, single = engine.submit(prompt(6, 1), greedy(9)), engine.submit(prompt(1), reading())
    handle = engine.submit(ids, reading())
    harness.run(engine)
    with torch.no_grad():
        logits = harness.llm.model(torch.tensor([ids + handle.token_ids])).logits[0].float()
    every = torch.log_softmax(logits, dim=-1)
    answer = every[len(ids) - 1 : -1].gather(1, torch.tensor(handle.token_ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(handle.logprobs), answer, atol=1e-4, rtol=0)
    expected = every[: len(ids) - 1]
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
    assert single.prompt_samples == ()


def test_those_of_a_prompt_come_once_and_before_the_first_token_also_after_a_preemption(harness):
    engine = harness.engine(prefill_chunk_tokens=3)
    seen = []
    handle = engine.submit(
        prompt(8), reading(5), lambda event: seen.append((event, handle.prompt_samples))
    )
    for _ in range(2):
        engine.step()  # two of three chunks
    preempt(engine)
    steps(engine, 5)
    assert handle.token_ids
    preempt(engine)
    harness.run(engine)
    assert handle.preemptions == 2
    at_tokens = [samples for event, samples in seen if isinstance(event, TokenEvent)]
    assert len(at_tokens) == 5
    assert all(samples is handle.prompt_samples for samples in at_tokens)
    assert len(handle.prompt_samples) == 7
