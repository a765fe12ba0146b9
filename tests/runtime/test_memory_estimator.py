"""Shapes of batches, and what they need."""

import itertools
import json
import random

import pytest
import torch
from torch.profiler import profile

from rap_env.memory import MemoryModel
from rap_env.models.caches.cache_blocks import CacheBlock, LayerStack
from rap_env.plan import Plan
from rap_env.request import Request
from rap_env.runtime.memory_estimator import _LOWERING_BLOCKS, BatchShape, MemoryEstimator
from tests.tiny import tiny_llm

SHAPE = BatchShape(3, 20)


@pytest.fixture
def llm():
    made = tiny_llm(layers=3)
    made.set_residency("offload")
    return made


def test_a_mask_needs_its_peak_bytes_and_one_more_layer_of_keys_and_values(llm):
    memory, estimator = MemoryModel(llm), MemoryEstimator(llm)
    peak = memory.peak_bytes(Plan(), Request(3, 20, 1))
    layer = int(memory.kv_bytes_by_layer(3, 20)[0])
    assert estimator.peak_bytes(Plan(), SHAPE) == peak + layer


def test_the_guard_removes_blocks_in_order_until_the_mask_fits(llm):
    estimator, order = MemoryEstimator(llm), [4, 1, 0, 5, 2, 3]
    for count in range(7):
        expected = Plan.removing(*order[:count])
        limit = estimator.peak_bytes(expected, SHAPE)
        found = estimator.shrink_to_fit(Plan(), order, SHAPE, limit)
        assert found == expected
    everything = estimator.peak_bytes(Plan.removing(*order), SHAPE)
    assert estimator.shrink_to_fit(Plan(), order, SHAPE, everything - 1) is None
    assert estimator.shrink_to_fit(Plan(), [], SHAPE, everything) is None
    limit = estimator.peak_bytes(Plan.removing(3, 4), SHAPE)
    for start, order, expected in (((3,), [4, 1], (3, 4)), ((3, 4, 5), [1], (3, 4, 5))):
        fitting = estimator.shrink_to_fit(Plan.removing(*start), order, SHAPE, limit)
        assert fitting == Plan.removing(*expected)


def simulated(rows) -> int:
    """The most tokens that a batch ever holds, step by step."""
    rows, most = [list(row) for row in rows], 0
    while rows:
        most = max(most, len(rows) * max(held for held, _ in rows))
        rows = [[held + 1, coming - 1] for held, coming in rows if coming > 0]
    return most


def test_the_largest_shape_agrees_with_a_simulation():
    draw = random.Random(0)
    for _ in range(200):
        rows = [(draw.randint(1, 40), draw.randint(0, 40)) for _ in range(draw.randint(1, 9))]
        assert BatchShape.of(rows).tokens == simulated(rows), rows


def test_a_uniform_shape_covers_every_row_at_every_time():
    draw = random.Random(1)
    for _ in range(50):
        rows = [(draw.randint(1, 40), draw.randint(0, 40)) for _ in range(5)]
        shape = BatchShape.of(rows, uniform=True)
        assert shape.batch_size == 5
        assert shape.seq_len_tokens == max(held + coming for held, coming in rows) or (
            shape.tokens >= simulated(rows)
        )


@pytest.mark.parametrize(("bits", "fewer"), [(16, 8), (16, 4), (8, 4)])
def test_lowering_a_kept_block_takes_no_more_than_is_counted_for_it(bits, fewer, tmp_path):
    """Beside that block there may be one in native bits, on its way into the store."""
    layers, states = range(30), torch.randn(2, 30, 3, 32, 64).bfloat16()  # as the default model
    stack = LayerStack((*layers,), 16, (*states.unbind(),))
    block = CacheBlock((stack,), {}, torch.bfloat16, torch.device("cpu")).in_own_pages()
    native = block.bytes
    block = block.lowered(dict.fromkeys(layers, bits))
    with profile(profile_memory=True) as run:
        block.lowered(dict.fromkeys(layers, fewer))
    run.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    memory = sorted((e for e in events if e["name"] == "[memory]"), key=lambda event: event["ts"])
    most = max(itertools.accumulate(event["args"]["Bytes"] for event in memory))
    assert 0.8 * (_LOWERING_BLOCKS - 1) < most / native <= _LOWERING_BLOCKS - 1


def test_bytes_for_lowering_a_kept_block_grow_with_keys_and_values(llm):
    memory = MemoryModel(llm)
    native = memory.kv_bytes_by_layer(1, 32).sum()
    assert MemoryEstimator(llm).lowering_bytes == _LOWERING_BLOCKS * native
