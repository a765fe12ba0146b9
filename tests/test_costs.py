from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rap_env.costs import VectorByteTracker, request_costs
from rap_env.errors import InvalidRequestError
from rap_env.memory import MemoryModel
from rap_env.model_facts import ModelFacts
from rap_env.plan import Plan
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


@pytest.mark.parametrize("shape", SHAPES)
def test_peaks_are_those_of_the_memory_model(memory, shape):
    costs, request = request_costs(memory, *shape), Request(*shape, 1)
    masks = [Plan(frozenset(np.flatnonzero(bits))) for bits in _bits(2 * LAYERS)]
    assert len(masks) == 256
    for mask in masks:
        assert costs.peak_bytes(mask.removed) == memory.peak_bytes(mask, request), mask


@pytest.mark.parametrize("shape", SHAPES)
def test_parts_are_those_of_the_memory_model(memory, shape):
    costs, request = request_costs(memory, *shape), Request(*shape, 1)
    assert costs.dense_peak_bytes == memory.dense_peak_bytes(*shape)
    assert costs.kv_cache_bytes == memory.breakdown(Plan(), request).kv_cache
    assert costs.least_peak_bytes == memory.least_peak_bytes(request)
    assert costs.freed == tuple(memory.freed_bytes(request))
    assert costs.freed_share == pytest.approx(np.array(costs.freed) / costs.dense_peak_bytes)
    assert (costs.last_ffn_bytes > 0) == (memory.facts.ffn_width == 400)


@pytest.mark.parametrize("shape", SHAPES)
def test_stubs_do_not_change_dense_bytes_and_reduce_freed_bytes(memory, shape):
    plain = MemoryModel(replace(memory.facts, stub_bytes=(), repair=""))
    ours, theirs = request_costs(memory, *shape), request_costs(plain, *shape)
    stub_bytes = memory.facts.stub_bytes or (0,) * 2 * LAYERS
    assert ours.dense_peak_bytes == theirs.dense_peak_bytes
    assert ours.last_ffn_bytes == theirs.last_ffn_bytes
    assert (theirs.freed_bytes - ours.freed_bytes).tolist() == list(stub_bytes)
    assert ours.least_peak_bytes - theirs.least_peak_bytes == sum(stub_bytes)
    for index, held in enumerate(stub_bytes):
        assert ours.peak_bytes([index]) - theirs.peak_bytes([index]) == held


def test_cost_arrays_are_cached_and_read_only(memory):
    costs = request_costs(memory, 2, 30)
    assert request_costs(memory, 2, 30) is costs
    for array in (costs.freed_bytes, costs.freed_share):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_costs_of_models_do_not_mix(memory):
    other = MemoryModel(memory.facts)
    assert request_costs(other, 2, 30) is not request_costs(memory, 2, 30)


@pytest.mark.parametrize(("shape", "message"), [((0, 5), "not 0"), ((1, 2049), "2048 tokens")])
def test_requests_that_the_model_cannot_serve_are_rejected(memory, shape, message):
    with pytest.raises(InvalidRequestError, match=message):
        request_costs(memory, *shape)


def test_non_integers_are_rejected_and_not_cached(memory):
    with pytest.raises(InvalidRequestError, match=r"not 7\.0"):
        request_costs(memory, 1, 7.0)
    assert isinstance(request_costs(memory, 1, 7).dense_peak_bytes, int)


def _bits(count: int) -> np.ndarray:
    return np.arange(2**count)[:, None] >> np.arange(count) & 1


def test_an_order_is_followed_until_the_budget_is_met_or_it_ends(memory):
    costs = request_costs(memory, 2, 16)
    order = [3, 0, 5, 2]
    for fraction in (1.0, 0.95, 0.8, 0.1):
        budget = int(fraction * costs.dense_peak_bytes)
        mask = costs.remove_until_fits(order, budget)
        assert mask == Plan.removing(*order[: len(mask.removed)])
        assert costs.peak_bytes(mask.removed) <= budget or len(mask.removed) == len(order)
        if mask:
            assert costs.peak_bytes(order[: len(mask.removed) - 1]) > budget


@pytest.mark.parametrize("shape", SHAPES)
def test_trackers_follow_removals_in_any_order(memory, shape):
    costs, rng = request_costs(memory, *shape), np.random.default_rng(0)
    orders = np.array([rng.permutation(2 * LAYERS) for _ in range(6)])
    vector = VectorByteTracker(len(orders), 2 * LAYERS)
    singles = [costs.tracker(order[:2]) for order in orders]
    for row, order in enumerate(orders):
        vector.start(np.array([row]), [costs], order[:2])
    for step in range(2, 2 * LAYERS):
        index, removes = orders[:, step], np.ones(len(orders), dtype=bool)
        vector.remove(index, removes, vector.peak_without(index, removes))
        for row, (tracker, order) in enumerate(zip(singles, orders, strict=True)):
            expected = memory.peak_bytes(Plan.removing(*order[: step + 1]), Request(*shape, 1))
            assert tracker.peak_without(order[step]) == expected
            tracker.remove(order[step])
            assert tracker.peak_bytes == vector.peak_bytes[row] == expected


def test_a_vector_tracker_leaves_requests_without_a_flag_as_they_are(memory):
    vector, shapes = VectorByteTracker(3, 2 * LAYERS), [(1, 5), (2, 30), (3, 17)]
    every_ffn = list(range(1, 2 * LAYERS, 2))
    costs = [request_costs(memory, *shape) for shape in shapes]
    vector.start(np.arange(3), costs, every_ffn[1:])
    removes = np.array([True, False, True])
    before, index = vector.peak_bytes.copy(), np.ones(3, dtype=int)
    vector.remove(index, removes, vector.peak_without(index, removes))
    assert vector.peak_bytes[1] == before[1]
    for row in (0, 2):
        assert vector.peak_bytes[row] == request_costs(memory, *shapes[row]).peak_bytes(every_ffn)
    vector.remove(index, ~removes, vector.peak_without(index, ~removes))
    assert vector.peak_bytes[1] == request_costs(memory, *shapes[1]).peak_bytes(every_ffn)


def test_peaks_of_whole_masks_are_those_of_the_memory_model(memory):
    vector, removed = VectorByteTracker(len(SHAPES), 2 * LAYERS), _bits(2 * LAYERS) > 0
    costs = [request_costs(memory, *shape) for shape in SHAPES]
    vector.start(np.arange(len(SHAPES)), costs)
    rows = np.arange(len(removed)) % len(SHAPES)
    for row, bits, peak in zip(rows, removed, vector.peaks_of(rows, removed), strict=True):
        mask = Plan(frozenset(np.flatnonzero(bits)))
        assert peak == memory.peak_bytes(mask, Request(*SHAPES[row], 1))
