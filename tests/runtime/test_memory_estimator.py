from __future__ import annotations

import pytest

from rap_env.memory import MemoryModel
from rap_env.models.live.live_batch import LiveBatch
from rap_env.plan import Plan
from rap_env.request import Request
from rap_env.runtime.batch_shape import EMPTY_BATCH, BatchShape
from rap_env.runtime.memory_estimator import MemoryEstimator
from tests.tiny import tiny_llm

SHAPE = BatchShape(3, 20)
PROMPTS = [[5] * 20] * 3


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


@pytest.mark.parametrize("residency", ["offload", "resident"])
@pytest.mark.parametrize("blocks", [(), (0,), (1, 2), (0, 2, 4), (1, 3, 5), tuple(range(6))])
def test_estimates_cover_held_bytes_and_add_at_most_workspace_and_copies(llm, residency, blocks):
    llm.set_residency(residency)
    mask, estimator = Plan.removing(*blocks), MemoryEstimator(llm)
    llm.apply(mask)
    batch = LiveBatch(llm)
    batch.prefill(PROMPTS)
    held = llm.held_bytes.total
    need = estimator.peak_bytes(mask, SHAPE)
    assert held <= need <= held + estimator.workspace_bytes(SHAPE)


def test_resident_weights_are_not_freed_and_the_guard_skips_them(llm):
    llm.set_residency("resident")
    estimator = MemoryEstimator(llm)
    freed = estimator.freed_bytes(SHAPE)
    assert set(freed[1::2]) == {0}
    assert min(freed[0::2]) > 0
    limit = estimator.peak_bytes(Plan.removing(0, 2), SHAPE)
    order = [1, 0, 3, 2, 5, 4]
    found = estimator.shrink_to_fit(Plan(), order, SHAPE, limit)
    assert found == Plan.removing(0, 2)


def test_an_empty_batch_needs_the_weights_and_one_token(llm):
    estimator = MemoryEstimator(llm)
    held = llm.held_bytes.total
    assert held < estimator.peak_bytes(Plan(), EMPTY_BATCH) < held + 2000


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


def test_the_guard_starts_from_the_given_mask(llm):
    estimator = MemoryEstimator(llm)
    limit = estimator.peak_bytes(Plan.removing(3, 4), SHAPE)
    for start, order, expected in (((3,), [4, 1], (3, 4)), ((3, 4, 5), [1], (3, 4, 5))):
        found = estimator.shrink_to_fit(Plan.removing(*start), order, SHAPE, limit)
        assert found == Plan.removing(*expected)


def test_sliding_windows_limit_the_cache_of_a_row():
    estimator = MemoryEstimator(tiny_llm("mistral_sliding"))
    short, long = (estimator.workspace_bytes(BatchShape(1, tokens)) for tokens in (20, 21))
    model = estimator.memory
    activations = model.workspace_bytes(Request(1, 21, 1)) - model.workspace_bytes(
        Request(1, 20, 1)
    )
    assert long - short == activations
