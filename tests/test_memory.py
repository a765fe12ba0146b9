import json
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rap_env.errors import InfeasibleBudgetError, InvalidRequestError, UnknownNameError
from rap_env.ladder.ladder_bytes import mask_bytes
from rap_env.memory import MAX_BATCH_SIZE, PREFILL_CHUNK_TOKENS, MemoryModel, ModelFacts
from rap_env.plan import Plan
from rap_env.request import Request

FACTS = ModelFacts(
    name="made-up",
    fingerprint="f" * 64,
    dtype="bfloat16",
    block_param_bytes=(100, 300, 100, 300, 110, 330),
    base_bytes=1000,
    kv_bytes_per_token=(8, 8, 4),
    kv_window_tokens=(None, 5, None),
    itemsize=2,
    hidden_size=16,
    ffn_width=48,
    vocab_size=50,
    max_positions=4096,
)
MEMORY = MemoryModel(FACTS)
REQUEST = Request(2, 10, 1)

SHAPES = st.tuples(st.integers(1, 512), st.integers(1, FACTS.max_positions))
MASKS = st.builds(Plan, st.frozensets(st.integers(0, FACTS.num_blocks - 1)))


def test_every_byte_of_a_small_case_by_hand() -> None:
    parts = MEMORY.breakdown(Plan.removing("layer00.attn", "layer02.ffn"), REQUEST)
    assert parts.attn_weights == 100 + 110
    assert parts.ffn_weights == 300 + 300
    assert parts.embeddings == 1000
    # layer 1 holds its window of 5 tokens, layer 2 all 10, each of 2 sequences
    assert parts.kv_cache == 2 * (5 * 8 + 10 * 4)
    # 20 tokens of bfloat16: 3 streams and the two halves of a gated ffn; float32 logits
    assert parts.workspace == 20 * 2 * (3 * 16 + 2 * 48) + 2 * 50 * 4
    assert parts.weights == 810
    assert parts.peak == 810 + 1000 + 160 + parts.workspace
    assert sum(parts.as_dict().values()) == parts.peak


@given(SHAPES, MASKS, st.integers(0, FACTS.num_blocks - 1))
def test_each_removed_block_lowers_the_peak_by_what_it_frees(
    shape: tuple[int, int], mask: Plan, index: int
) -> None:
    request = Request(*shape, budget_bytes=1)
    kept = Plan(mask.removed - {index})
    before, after = (MEMORY.breakdown(m, request) for m in (kept, kept.without(index)))
    freed = int(MEMORY.freed_bytes(request)[index])
    workspace = before.workspace - after.workspace
    assert freed > 0
    assert workspace >= 0
    assert before.peak - after.peak == freed + workspace


def test_facts_are_read_as_they_were_written() -> None:
    assert FACTS.identity == {"model": "f" * 64, "dtype": "bfloat16"}
    written = json.loads(json.dumps(asdict(FACTS)))
    assert ModelFacts.from_json(written) == ModelFacts.from_json({**written, "more": 1}) == FACTS


@given(SHAPES, MASKS)
def test_no_mask_needs_less_than_the_least_or_more_than_dense(
    shape: tuple[int, int], mask: Plan
) -> None:
    request = Request(*shape, budget_bytes=1)
    peak = MEMORY.peak_bytes(mask, request)
    assert MEMORY.peak_bytes_without_blocks(request) <= peak <= MEMORY.native_peak_bytes(*shape)


@given(SHAPES, MASKS)
def test_more_to_serve_never_needs_less(shape: tuple[int, int], mask: Plan) -> None:
    batch, length = shape
    peak = MEMORY.peak_bytes(mask, Request(batch, length, 1))
    assert MEMORY.peak_bytes(mask, Request(batch + 1, length, 1)) > peak
    longer = Request(batch, min(length + 1, FACTS.max_positions), 1)
    assert MEMORY.peak_bytes(mask, longer) >= peak


def test_the_workspace_is_bounded_by_the_prefill_chunk() -> None:
    full, beyond = (
        MEMORY.breakdown(Plan(), Request(1, length, 1)).workspace
        for length in (PREFILL_CHUNK_TOKENS, PREFILL_CHUNK_TOKENS + 1)
    )
    assert full == beyond


def test_sizes_beyond_32_bits_are_exact() -> None:
    big = replace(FACTS, block_param_bytes=(2**40,) * 6, kv_bytes_per_token=(2**20,) * 3)
    parts = MemoryModel(big).breakdown(Plan(), Request(4096, 4096, 1))
    assert parts.weights == 6 * 2**40
    assert parts.kv_cache == 4096 * 2**20 * (4096 + 5 + 4096)


# Requests that cannot be


@pytest.mark.parametrize(
    ("field", "value"),
    [("batch_size", 0), ("seq_len_tokens", -1), ("budget_bytes", 1.5), ("batch_size", True)],
)
def test_an_empty_request_is_rejected(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=f"{field} must be .* not {value}"):
        replace(REQUEST, **{field: value})


def test_numpy_integers_make_a_plain_request() -> None:
    request = Request(np.int64(2), np.int32(10), np.uint8(1))  # type: ignore[arg-type]
    assert request == REQUEST
    assert type(request.batch_size) is int


def test_a_length_beyond_the_models_positions_is_rejected() -> None:
    with pytest.raises(InvalidRequestError, match="from 1 to 4096 tokens"):
        MEMORY.peak_bytes(Plan(), Request(1, 4097, 1))
    with pytest.raises(InvalidRequestError, match="batch size must be from 1 to .*, not 0"):
        MEMORY.check(0, 10)


def test_a_batch_beyond_64_bit_arithmetic_is_rejected() -> None:
    for batch_size in (MAX_BATCH_SIZE + 1, 10**30):
        with pytest.raises(InvalidRequestError, match=f"to 1048576, not {batch_size}"):
            MEMORY.peak_bytes(Plan(), Request(batch_size, 10, 1))
    request = Request(MAX_BATCH_SIZE, 4096, 1)
    peak = MEMORY.peak_bytes(Plan(), request)
    assert peak == MEMORY.native_peak_bytes(MAX_BATCH_SIZE, 4096) > 0


def test_a_mask_of_another_model_is_rejected() -> None:
    with pytest.raises(UnknownNameError, match=r"'layer03\.attn'; known are 'layer00\.attn \.\.\."):
        MEMORY.peak_bytes(Plan.removing("layer03.attn"), REQUEST)


def test_a_budget_below_every_mask_is_rejected_with_the_least() -> None:
    least = MEMORY.peak_bytes_without_blocks(REQUEST)
    mask_bytes(MEMORY).check_feasible(replace(REQUEST, budget_bytes=least))
    with pytest.raises(InfeasibleBudgetError) as caught:
        mask_bytes(MEMORY).check_feasible(replace(REQUEST, budget_bytes=least - 1))
    text = str(caught.value)
    assert f"No mask of made-up fits {least - 1:,} bytes for 2 x 10 tokens" in text
    assert f"it still needs {least:,} bytes" in text
    assert "infeasible='clip'" in text


@given(SHAPES, st.floats(0.01, 2.0))
def test_a_budget_as_a_fraction_of_the_dense_peak(shape: tuple[int, int], fraction: float) -> None:
    request = Request.at_fraction(MEMORY, *shape, fraction)
    dense = MEMORY.native_peak_bytes(*shape)
    assert request.budget_bytes == max(1, int(fraction * dense))
    assert (request.batch_size, request.seq_len_tokens) == shape


@pytest.mark.parametrize("fraction", [0.0, -0.5, float("nan"), float("inf")])
def test_an_invalid_budget_fraction_is_rejected(fraction: float) -> None:
    with pytest.raises(InvalidRequestError, match="budget fraction must be above 0, not"):
        Request.at_fraction(MEMORY, 1, 1, fraction)
