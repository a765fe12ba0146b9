"""`generate` under a plan: each way of decoding, given caches, and several threads."""

import threading

import pytest
import torch
from transformers import DynamicCache

from rap_env.errors import UnsupportedCacheError
from rap_env.models.caches.kv_cache import cache_argument
from rap_env.plan import Plan
from tests.models.generation import cached_step
from tests.tiny import FAMILIES, LAYERS, padded_batch, tiny_llm

ATTENTION = Plan.removing(*range(0, 2 * LAYERS, 2))
REMOVED = {"first": Plan.removing(0), "last": Plan.removing(2, 1), "all": ATTENTION}
NEW = 7


def generate(llm, **kwargs):
    ask = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return llm.generate(**{**padded_batch(), **ask, **kwargs})


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mistral_sliding"])
@pytest.mark.parametrize(
    ("ask", "cached"),
    [
        ({"num_beams": 3}, {}),
        ({"num_beams": 2, "do_sample": True}, {}),
        ({"do_sample": True, "num_return_sequences": 2}, {}),
        ({}, {"prefill_chunk_size": 4}),
        ({}, {"cache_implementation": "static"}),
    ],
    ids=["beams", "sampled beams", "samples", "chunks", "static cache"],
)
@pytest.mark.parametrize("removed", REMOVED.values(), ids=REMOVED.keys())
def test_decoding_with_a_cache_equals_decoding_without(name, ask, cached, removed) -> None:
    llm = tiny_llm(name)
    llm.apply(removed)
    actual = []
    for more in ({"use_cache": True, **cached}, {"use_cache": False}):
        torch.manual_seed(7)
        actual.append(generate(llm, **ask, **more))
    assert torch.equal(*actual)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_cache_of_earlier_tokens_goes_on_under_its_own_plan_only(name) -> None:
    llm = tiny_llm(name)
    llm.apply(Plan.removing(0))
    expected = generate(llm)
    cache = DynamicCache(config=llm.model.config)
    given = {cache_argument(llm.model): cache}
    first = generate(llm, max_new_tokens=3, **given)
    for other in (Plan(), ATTENTION):
        llm.apply(other)
        with pytest.raises(UnsupportedCacheError, match="filled under a plan with other attention"):
            generate(llm, **given)
    llm.apply(Plan.removing(0, 3))
    llm.apply(Plan.removing(0))
    ones = torch.ones(3, 3, dtype=torch.long)
    mask = torch.cat([padded_batch()["attention_mask"], ones], dim=1)
    more = {"input_ids": first, "attention_mask": mask, "max_new_tokens": NEW - 3}
    assert torch.equal(generate(llm, **more, **given), expected)


def test_under_one_plan_concurrent_calls_equal_single_calls() -> None:
    llm = tiny_llm("gemma2")
    llm.apply(Plan.removing(0, 3))
    alone = generate(llm)
    actual: list[torch.Tensor] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            actual.extend(generate(llm) for _ in range(4))
        except BaseException as error:
            errors.append(error)

    def disturb() -> None:
        for _ in range(40):
            with llm.applied(Plan.removing(1, 2)):
                cached_step(llm.model, padded_batch()["input_ids"], None)

    threads = [threading.Thread(target=work) for _ in range(3)]
    threads.append(threading.Thread(target=disturb))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    assert len(actual) == 12
    assert all(torch.equal(out, alone) for out in actual)
