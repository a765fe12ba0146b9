from __future__ import annotations

import json
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rap_env.blocks import Block, block_index, block_name
from rap_env.errors import UnknownNameError
from rap_env.plan import Plan

INDICES = st.integers(0, 500)
MASKS = st.builds(Plan, st.frozensets(INDICES, max_size=20))


@pytest.mark.parametrize(
    ("index", "name"),
    [(0, "layer00.attn"), (1, "layer00.ffn"), (14, "layer07.attn"), (201, "layer100.ffn")],
)
def test_names_and_indices(index: int, name: str) -> None:
    block = Block(index, param_bytes=8)
    assert block_name(index) == block.name == name
    assert block_index(name) == block_index(block) == block_index(index) == index
    assert (block.layer, block.kind) == (index // 2, name.split(".")[1])


@pytest.mark.parametrize(
    "wrong",
    [
        *("layer00", "layer00.mlp", "layer-1.ffn", "Layer00.ffn", " layer00.ffn", "layer٣.ffn", ""),
        *(-1, 1.0, None, True, np.float64(2.0), np.True_),
    ],
)
def test_invalid_blocks_are_rejected(wrong: Any) -> None:
    for use in (
        block_index,
        Plan.removing,
        Plan().without,
        lambda block: Plan([block]),
    ):
        with pytest.raises(UnknownNameError, match=r"Unknown block .* written layerNN\.attn or"):
            use(wrong)


def test_a_misspelt_block_gets_a_suggestion() -> None:
    with pytest.raises(UnknownNameError, match=r"block 'layer00\.attm'; .*mean 'layer00\.attn'\?"):
        block_index("layer00.attm")


def test_numpy_integers_are_indices_and_become_plain_ones() -> None:
    mask = Plan.removing(np.int64(3), *np.array([5, 7]))
    assert mask == Plan.removing(3, 5, 7)
    assert {type(index) for index in sorted(mask.removed)} == {int}


def test_the_empty_mask_is_the_dense_model() -> None:
    assert not Plan()
    assert str(Plan()) == "dense"
    assert Plan().removed_names == ()


def test_a_mask_of_all_or_of_one_kind() -> None:
    blocks = [Block(index, 1) for index in range(4)]
    assert Plan.removing(*blocks) == Plan.removing(0, 1, 2, 3)
    assert Plan.removing(*(b for b in blocks if b.kind == "ffn")).removed_names == (
        "layer00.ffn",
        "layer01.ffn",
    )
    attention = Plan.removing(*(b for b in blocks if b.kind == "attn"))
    assert str(attention) == "without layer00.attn, layer01.attn"


@given(MASKS)
def test_a_mask_is_a_value(mask: Plan) -> None:
    again = Plan.removing(*reversed(mask.removed_names))
    assert again == mask
    assert hash(again) == hash(mask)
    assert pickle.loads(pickle.dumps(mask)) == mask
    assert Plan(list(mask.removed)) == mask  # any iterable is taken, and kept as a frozenset
    with pytest.raises(AttributeError):
        mask.removed = frozenset()  # type: ignore[misc]


@given(MASKS)
def test_names_and_counts(mask: Plan) -> None:
    assert list(mask.removed_names) == [block_name(index) for index in sorted(mask.removed)]
    assert mask.count_removed("attn") + mask.count_removed("ffn") == len(mask.removed)


@given(MASKS)
def test_json_round_trip(mask: Plan) -> None:
    assert json.loads(mask.to_json()) == dict.fromkeys(mask.removed_names, "removed")
    assert Plan.from_json(mask.to_json()) == mask
    assert Plan.of_record(mask.removed_names) == Plan.of_record(mask.levels) == mask


@given(MASKS)
def test_a_model_must_have_the_blocks_of_a_mask(mask: Plan) -> None:
    size = max(mask.removed, default=-1) + 1
    assert mask.check(size) is mask
    if size > 1:
        with pytest.raises(UnknownNameError, match=f"'{block_name(size - 1)}'; known are 'layer00"):
            mask.check(size - 1)
