"""Native caches with room for later tokens: the same values, without copies."""

import sys

import pytest
import torch

from rap_env.models.caches.kv_cache import ReservedLayer
from rap_env.models.device import own_pages
from rap_env.models.live.live_batch import LiveBatch
from rap_env.plan import Plan
from rap_env.runtime.memory_monitor import ResidentMeter
from tests.models.grouped import long_llm, uniform
from tests.tiny import FAMILIES, LAYERS, tiny_llm

ROWS = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15]]


def places(batch: LiveBatch) -> list[int]:
    return [
        tensor.data_ptr()
        for layer in batch._parts[0].cache.layers
        if isinstance(layer, ReservedLayer)
        for tensor in (layer.keys, layer.values)
    ]


def filled(llm, reserve_tokens: int) -> LiveBatch:
    batch = LiveBatch(llm)
    batch.reserve_tokens = reserve_tokens
    batch.prefill(ROWS)
    return batch


@pytest.mark.parametrize("name", FAMILIES)
def test_room_changes_no_bit_of_any_step(name) -> None:
    llm = tiny_llm(name)
    roomy, tight = filled(llm, 12), filled(llm, 0)
    for token in range(3, 9):  # past the reserve of 12 tokens
        assert torch.equal(roomy.extend([token] * 2), tight.extend([token] * 2))
    for batch in (roomy, tight):
        batch.keep([1])
        other = filled(llm, batch.reserve_tokens)
        batch.join(other)
    assert torch.equal(roomy.extend([3] * 3), tight.extend([3] * 3))


def test_within_the_reserve_nothing_is_copied_and_its_bytes_count_from_the_start() -> None:
    llm = tiny_llm()
    batch = filled(llm, 12)
    before, held_bytes = places(batch), batch.kv_bytes
    for _ in range(5):
        batch.extend([3, 3])
        assert (places(batch), batch.kv_bytes) == (before, held_bytes)
    exact = filled(llm, 0)
    for _ in range(5):
        exact.extend([3, 3])
    assert exact.kv_bytes == held_bytes
    batch.extend([3, 3])  # a 13th token
    assert batch.kv_bytes == held_bytes * 13 // 12


def test_rows_that_leave_or_join_get_room_again() -> None:
    llm = tiny_llm()
    batch, other = filled(llm, 7), filled(llm, 7)
    batch.reserve_tokens = 20
    batch.join(other)
    joined = batch.kv_bytes
    before = places(batch)
    for _ in range(13):
        batch.extend([3] * 4)
    assert (places(batch), batch.kv_bytes) == (before, joined)
    batch.reserve_tokens = 21
    batch.keep([0])
    assert batch.kv_bytes * 4 * 20 == joined * 21


def test_a_removed_block_and_a_lower_level_free_what_was_reserved() -> None:
    llm = long_llm()
    batch = LiveBatch(llm)
    batch.reserve_tokens = 200
    batch.prefill(ROWS)
    share = batch.kv_bytes // LAYERS
    llm.apply(Plan.removing(0))
    assert batch.kv_bytes < share * (LAYERS - 1) + 100
    llm.apply(uniform("int8").without(0))
    batch.extend([3, 3])
    assert batch.kv_bytes < share


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_freed_pages_leave_the_process_at_once() -> None:
    meter, size = ResidentMeter(tiny_llm()), 16 * 2**20
    pages = [own_pages(2**16).zero_() for _ in range(size // 2**16)]
    between = [bytearray(2**10) for _ in pages]  # younger objects in the heap
    full = meter.used_bytes()
    del pages
    assert full - meter.used_bytes() >= 0.95 * size
    assert len(between) == size // 2**16
