from __future__ import annotations

import json
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rap_env.blocks import Block, BlockMask, block_index, block_name
from rap_env.errors import ArtifactError, UnknownNameError

INDICES = st.integers(0, 500)
MASKS = st.builds(BlockMask, st.frozensets(INDICES, max_size=20))


@pytest.mark.parametrize(
    ("index", "name"),
    [(0, "layer00.attn"), (1, "layer00.ffn"), (14, "layer07.attn"), (201, "layer100.ffn")],
)
def test_names_and_indices(index: int, name: str) -> None:
    block = Block(index, param_bytes=8)
    assert block_name(index) == block.name == name
    assert block_index(name) == block_index(block) == block_index(index) == index
    assert (block.layer, block.kind) == (index // 2, name.split(".")[1])


@given(INDICES)
def test_every_index_has_one_name(index: int) -> None:
    assert block_index(block_name(index)) == index


@given(INDICES)
def test_names_sort_within_a_hundred_layers_as_the_blocks_do(index: int) -> None:
    if index < 198:
        assert block_name(index) < block_name(index + 2)


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
        BlockMask.of,
        lambda block: BlockMask([block]),
        BlockMask().__contains__,
    ):
        with pytest.raises(UnknownNameError, match=r"Unknown block .* written layerNN\.attn or"):
            use(wrong)


def test_a_misspelt_block_gets_a_suggestion() -> None:
    with pytest.raises(UnknownNameError, match=r"block 'layer00\.attm'; .*mean 'layer00\.attn'\?"):
        block_index("layer00.attm")


def test_numpy_integers_are_indices_and_become_plain_ones() -> None:
    mask = BlockMask.of(np.int64(3), *np.array([5, 7]))
    assert mask == BlockMask.of(3, 5, 7)
    assert {type(index) for index in mask} == {int}


def test_the_empty_mask_is_the_dense_model() -> None:
    assert not BlockMask()
    assert str(BlockMask()) == "dense"
    assert BlockMask().names == ()


def test_a_mask_of_all_or_of_one_kind() -> None:
    blocks = [Block(index, 1) for index in range(4)]
    assert BlockMask.all_of(blocks) == BlockMask.of(0, 1, 2, 3)
    assert BlockMask.all_of(blocks, "ffn").names == ("layer00.ffn", "layer01.ffn")
    assert str(BlockMask.all_of(blocks, "attn")) == "without layer00.attn, layer01.attn"


@given(MASKS, MASKS)
def test_set_operations(one: BlockMask, other: BlockMask) -> None:
    assert set(one | other) == set(one) | set(other)
    assert set(one & other) == set(one) & set(other)
    assert set(one - other) == set(one) - set(other)
    assert (one <= other) == (set(one) <= set(other))
    assert (one >= other) == (set(one) >= set(other))
    assert len(one | other) + len(one & other) == len(one) + len(other)


@given(MASKS)
def test_a_mask_is_a_value(mask: BlockMask) -> None:
    again = BlockMask.of(*reversed(mask.names))
    assert again == mask
    assert hash(again) == hash(mask)
    assert pickle.loads(pickle.dumps(mask)) == mask
    assert BlockMask(list(mask)) == mask  # any iterable is taken, and kept as a frozenset
    with pytest.raises(AttributeError):
        mask.indices = frozenset()  # type: ignore[misc]


@given(MASKS)
def test_it_iterates_and_counts_in_order(mask: BlockMask) -> None:
    assert list(mask) == sorted(mask.indices)
    assert list(mask.names) == [block_name(index) for index in mask]
    assert mask.count("attn") + mask.count("ffn") == len(mask)
    assert all(name in mask and index in mask for name, index in zip(mask.names, mask, strict=True))


@given(MASKS)
def test_json_round_trip(mask: BlockMask) -> None:
    assert json.loads(mask.to_json()) == list(mask.names)
    assert BlockMask.from_json(mask.to_json()) == mask


@pytest.mark.parametrize("text", ["", "[", '["layer00.attn"', '"layer00.attn"', "{}", "3"])
def test_json_that_is_no_mask_is_rejected(text: str) -> None:
    with pytest.raises(ArtifactError, match="should be a JSON list of block names"):
        BlockMask.from_json(text)


def test_json_with_a_wrong_name_is_rejected() -> None:
    with pytest.raises(UnknownNameError, match=r"Unknown block 'layer00\.mlp'"):
        BlockMask.from_json('["layer00.mlp"]')


@given(MASKS)
def test_a_model_must_have_the_blocks_of_a_mask(mask: BlockMask) -> None:
    size = max(mask, default=-1) + 1
    assert mask.check(size) is mask
    if size > 1:
        with pytest.raises(UnknownNameError, match=f"'{block_name(size - 1)}'; known are 'layer00"):
            mask.check(size - 1)
