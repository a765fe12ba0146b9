"""Bytes of masks by the ladder of kept and removed blocks: those of the memory model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rap_env.errors import InvalidRequestError
from rap_env.ladder.items import Ladder
from rap_env.ladder.ladder_bytes import LadderBytes
from rap_env.memory import MemoryModel
from rap_env.model_facts import ModelFacts
from rap_env.plan import Plan, every_mask
from rap_env.request import Request

LAYERS = 4
SHAPES = [(1, 1), (1, 2000), (3, 17), (64, 512)]
STUB_BYTES = tuple(range(50, 50 + 20 * LAYERS, 10))
"""Uneven stubs, all of them smaller than their blocks."""


@pytest.fixture(scope="module", params=[(), STUB_BYTES], ids=["plain", "with stubs"])
def stub_bytes(request) -> tuple[int, ...]:
    return request.param


@pytest.fixture(scope="module", params=[3, 400], ids=["narrow", "wide"])
def memory(request, stub_bytes) -> MemoryModel:
    """Uneven blocks, sliding windows, and FFN blocks that set the workspace or not."""
    return MemoryModel(
        ModelFacts(
            name="uneven",
            fingerprint="0" * 64,
            dtype="bfloat16",
            block_param_bytes=tuple(range(1000, 1000 + 2 * LAYERS)),
            base_bytes=3000,
            kv_bytes_per_token=(8, 4, 8, 6),
            kv_window_tokens=(None, 16, None, 100),
            itemsize=2,
            hidden_size=8,
            ffn_width=request.param,
            vocab_size=10,
            max_positions=2048,
            stub_bytes=stub_bytes,
            repair="r" * 64 if stub_bytes else "",
        )
    )


def costs_of(memory, shape):
    return LadderBytes(memory, Ladder.of(memory.facts, "masks")).costs(*shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_they_are_those_of_the_memory_model(memory, shape):
    costs, request = costs_of(memory, shape), Request(*shape, 1)
    masks = list(every_mask(2 * LAYERS))
    assert len(masks) == 256
    positions = np.array([costs.ladder.positions(mask) for mask in masks])
    peaks = [memory.peak_bytes(mask, request) for mask in masks]
    assert costs.peaks(positions).tolist() == peaks
    assert [costs.state(row).peak_bytes for row in positions.tolist()] == peaks
    assert costs.dense_peak_bytes == memory.dense_peak_bytes(*shape)
    assert costs.kv_cache_bytes == memory.breakdown(Plan(), request).kv_cache
    assert costs.least_peak_bytes == memory.least_peak_bytes(request)
    assert costs.freed_bytes(positions[0]).tolist() == memory.freed_bytes(request).tolist()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_state_follows_removals_in_any_order(memory, shape):
    costs, rng = costs_of(memory, shape), np.random.default_rng(0)
    for _ in range(6):
        order, state = rng.permutation(2 * LAYERS).tolist(), costs.state()
        for step, block in enumerate(order):
            expected = memory.peak_bytes(Plan.removing(*order[: step + 1]), Request(*shape, 1))
            assert state.lowering(block).peak_bytes == expected
            state.lower(block)
            assert state.peak_bytes == expected


@pytest.mark.parametrize("shape", SHAPES)
def test_stubs_reduce_freed_bytes_and_do_not_change_dense_ones(memory, shape):
    plain = MemoryModel(replace(memory.facts, stub_bytes=(), repair=""))
    ours, theirs = costs_of(memory, shape), costs_of(plain, shape)
    stub_bytes = memory.facts.stub_bytes or (0,) * 2 * LAYERS
    assert ours.dense_peak_bytes == theirs.dense_peak_bytes
    native = [0] * 2 * LAYERS
    assert (theirs.freed_bytes(native) - ours.freed_bytes(native)).tolist() == list(stub_bytes)
    assert ours.least_peak_bytes - theirs.least_peak_bytes == sum(stub_bytes)


def test_an_order_is_followed_until_the_budget_is_met_or_it_ends(memory):
    costs, order = costs_of(memory, (2, 16)), [3, 0, 5, 2]
    for fraction in (1.0, 0.95, 0.8, 0.1):
        request = Request(2, 16, int(fraction * costs.dense_peak_bytes))
        mask = costs.lower_until_fits([(block, 1) for block in order], request.budget_bytes)
        removed = len(mask.removed)
        assert mask == Plan.removing(*order[:removed])
        assert removed == len(order) or memory.peak_bytes(mask, request) <= request.budget_bytes
        if mask:
            fewer = Plan.removing(*order[: removed - 1])
            assert memory.peak_bytes(fewer, request) > request.budget_bytes


@pytest.mark.parametrize(("shape", "message"), [((0, 5), "not 0"), ((1, 2049), "2048 tokens")])
def test_requests_that_the_model_cannot_serve_are_rejected(memory, shape, message):
    with pytest.raises(InvalidRequestError, match=message):
        costs_of(memory, shape)
