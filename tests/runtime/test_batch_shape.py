from __future__ import annotations

import random

import pytest

from rap_env.errors import InvalidRequestError
from rap_env.runtime.batch_shape import EMPTY_BATCH, BatchShape


def simulated(rows) -> int:
    """The most tokens that a batch ever holds, step by step."""
    rows, most = [list(row) for row in rows], 0
    while rows:
        most = max(most, len(rows) * max(held for held, _ in rows))
        rows = [[held + 1, coming - 1] for held, coming in rows if coming > 0]
    return most


def test_the_empty_batch_is_false_and_has_a_size_for_the_memory_model():
    assert not EMPTY_BATCH
    assert EMPTY_BATCH.request(0).seq_len_tokens == 1
    assert BatchShape.of([]) == EMPTY_BATCH
    assert BatchShape(2, 5).tokens == 10


@pytest.mark.parametrize("wrong", [(0, 3), (3, 0), (-1, 2)])
def test_invalid_shapes_are_rejected(wrong):
    with pytest.raises(InvalidRequestError, match="or 0 of both"):
        BatchShape(*wrong)


def test_one_row_ends_at_its_final_length():
    assert BatchShape.of([(7, 13)]) == BatchShape(1, 20)


def test_the_largest_shape_agrees_with_a_simulation():
    draw = random.Random(0)
    for _ in range(200):
        rows = [(draw.randint(1, 40), draw.randint(0, 40)) for _ in range(draw.randint(1, 9))]
        assert BatchShape.of(rows).tokens == simulated(rows), rows


def test_a_shape_knows_the_most_rows_of_its_batch():
    assert BatchShape(3, 20).rows == 3
    assert BatchShape.of([(100, 10)] * 7 + [(100, 900)]) == BatchShape(1, 1000, rows=8)


def test_a_uniform_shape_covers_every_row_at_every_time():
    draw = random.Random(1)
    for _ in range(50):
        rows = [(draw.randint(1, 40), draw.randint(0, 40)) for _ in range(5)]
        shape = BatchShape.of(rows, uniform=True)
        assert shape.batch_size == 5
        assert shape.seq_len_tokens == max(held + coming for held, coming in rows) or (
            shape.tokens >= simulated(rows)
        )
