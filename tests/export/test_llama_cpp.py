"""The static deployment in llama.cpp: bytes, choice, commands."""

import json

import pytest

from rap_env.errors import InfeasibleBudgetError
from rap_env.export.llama_cpp import (
    BATCHES,
    CACHE_TYPES,
    choose_deployment,
    deployment_bytes,
    file_sizes,
)
from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.policies.loading import StaticPolicy
from rap_env.policies.packaged_files import default_facts, find_delta_nll
from rap_env.request import Request
from tests.tiny import tiny_llm

WEIGHTS_BYTES = 96_576_768
COMPUTE_BYTES = {128: 26_937_917, 512: 54_368_666, 2048: 56_539_218, 4096: 59_160_658}
"""What llama.cpp reported for the default model and its compute buffers, by length."""


@pytest.mark.parametrize(
    ("name", "batch", "seq", "held_bytes"),
    [
        ("f16", 8, 2048, 474_064_128),
        ("q8_0", 4, 512, 121_648_220),
        ("q4_1", 16, 4096, 568_435_968),
        ("q4_0", 1, 128, 98_233_518),
    ],
)
def test_bytes_are_those_that_llama_cpp_reported(name, batch, seq, held_bytes):
    """Of weights and caches of the default model, in batches of 256 tokens."""
    (cache,) = (cache for cache in CACHE_TYPES if cache.name == name)
    facts = default_facts()
    sizes = file_sizes(facts, Plan())
    predicted = deployment_bytes(facts, sizes, cache, Request(batch, seq, 1), 256)
    assert predicted["weights_bytes"] == pytest.approx(WEIGHTS_BYTES, rel=0.02)
    assert predicted["kv_cache_bytes"] == pytest.approx(held_bytes - WEIGHTS_BYTES, rel=0.002)
    assert predicted["compute_bytes"] == pytest.approx(COMPUTE_BYTES[seq], rel=0.05)


def test_the_least_loss_that_fits_is_chosen():
    memory = MemoryModel(default_facts())
    before = 0.0
    for mebibytes in (2000, 250, 200, 150, 120, 90):
        request = Request(8, 1024, mebibytes * 2**20)
        chosen = choose_deployment(memory, request)
        assert chosen.peak_bytes <= request.budget_bytes
        assert chosen.delta_nll >= before
        before = chosen.delta_nll
        tighter = Request(8, 1024, chosen.peak_bytes)
        assert choose_deployment(memory, tighter).delta_nll == chosen.delta_nll
    roomy = choose_deployment(memory, Request(8, 1024, 2**31))
    assert (roomy.mask, roomy.cache.name, roomy.batch_tokens) == (Plan(), "f16", BATCHES[0])
    assert roomy.flags == "-ctk f16 -ctv f16 -c 8192 -np 8 -b 256 -ub 256"
    with pytest.raises(InfeasibleBudgetError, match=r"the smallest one needs [\d,]+"):
        choose_deployment(memory, Request(8, 1024, 2**20))


def test_a_deployment_loses_what_its_mask_and_its_caches_lose():
    """Of bf16 weights too, since the file for llama.cpp has the native ones."""
    native = MemoryModel(default_facts())
    for memory, budget in ((native, 140), (native, 110), (MemoryModel(default_facts("bf16")), 300)):
        chosen = choose_deployment(memory, Request(8, 1024, budget * 2**20))
        of_mask, _ = find_delta_nll(native, StaticPolicy(chosen.mask), chosen.mask)
        assert chosen.mask
        assert of_mask > 0
        assert chosen.delta_nll == of_mask + chosen.cache.delta_nll


def test_other_models_choose_among_caches():
    memory = MemoryModel(tiny_llm())
    dense = choose_deployment(memory, Request(1, 32, 2**30))
    of_mask = file_sizes(memory.facts, Plan())
    sizes = (
        deployment_bytes(memory.facts, of_mask, cache, dense.request, 32) for cache in CACHE_TYPES
    )
    chosen = choose_deployment(memory, Request(1, 32, min(sum(each.values()) for each in sizes)))
    assert (chosen.mask, chosen.cache.name) == (Plan(), "q4_0")


def test_rap_choose_shows_it_beside_the_live_plan(rap):
    shape = ("--batch", 8, "--seq", 1024, "--budget", "150MiB")
    code, out, _ = rap("choose", *shape, "--engine", "llama.cpp", "--json")
    assert code == 0
    answer = json.loads(out)
    deployed = answer["llama_cpp"]
    chosen = choose_deployment(MemoryModel(default_facts()), Request(8, 1024, 150 * 2**20))
    assert deployed["removed"] == list(chosen.mask.removed_names)
    assert deployed["delta_nll"] == chosen.delta_nll > answer["delta_nll"]
    code, out, _ = rap("choose", *shape, "--engine", "llama.cpp")
    assert code == 0
    assert f"\nllama-server -m smollm2-135m.pruned.gguf {chosen.flags}" in out
