"""Levels and plans, and plans that only remove blocks."""

import json
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rap_env.errors import ArtifactError, UnknownNameError
from rap_env.levels import GROUP_TOKENS, CacheLevel
from rap_env.plan import Plan, block_index, block_name, item_names

LEVELS = {
    "layer03.ffn": "removed",
    "layer00.cache": "int4-window512",
    "layer01.attn": "int8",
    "embeddings": "int8",
}
PLAN = Plan.of(LEVELS)


def test_a_plan_has_a_level_for_each_item() -> None:
    assert PLAN.levels == LEVELS
    assert [PLAN.weight_level(index) for index in (0, 2, 7)] == ["native", "int8", "removed"]
    assert PLAN.cache_level(0) == CacheLevel(4, 512)
    assert PLAN.cache_level(1).native


def test_a_digest_tells_plans_apart() -> None:
    plans = [PLAN, Plan(), Plan.removing(3), Plan.removing(3, 4)]
    assert len({plan.digest for plan in plans}) == len(plans)
    assert Plan.of(dict(reversed(LEVELS.items()))).digest == PLAN.digest
    assert len(PLAN.digest) == 12


def test_a_summary_names_levels_with_ranges_of_layers() -> None:
    assert Plan().summary == "native"
    assert PLAN.summary == ("removed ffn 3; int8 attn 1; int4-window512 cache 0; int8 embeddings")
    assert Plan.removing(0, 2, 4, 10).summary == "removed attn 0-2 5"
    lower = Plan.of({"layer03.ffn": "removed", "layer00.cache": "int4"})
    assert PLAN.summary_of_change(lower) == "int4 cache 0; native attn 1; native embeddings"
    assert PLAN.summary_of_change(PLAN) == ""


def test_equal_plans_are_equal_values() -> None:
    shuffled = Plan.of(dict(reversed(LEVELS.items())))
    assert shuffled == PLAN
    assert hash(shuffled) == hash(PLAN)
    same = {**LEVELS, "layer05.ffn": "native", "layer05.cache": "native"}
    assert Plan.of(same) == PLAN


def test_a_removed_attention_block_has_no_cache() -> None:
    both = Plan.of({"layer02.attn": "removed", "layer02.cache": "int2"})
    assert both == Plan.removing("layer02.attn")
    assert PLAN.without("layer00.attn", "layer01.attn").levels == {
        "layer00.attn": "removed",
        "layer01.attn": "removed",
        "layer03.ffn": "removed",
        "embeddings": "int8",
    }


def test_the_same_level_everywhere() -> None:
    plan = Plan.uniform(3, weights="int4", caches="int8", embeddings="int8").without(0)
    assert set(plan.levels) == set(item_names(3)) - {"layer00.cache"}
    assert plan.weight_level(0) == "removed"
    assert Plan.uniform(2, weights="removed") == Plan.removing(0, 1, 2, 3)


def test_lowering_keeps_other_levels() -> None:
    lower = PLAN.lower({"layer01.attn": "int4", "layer03.ffn": "int8"})
    assert lower.levels == {**LEVELS, "layer01.attn": "int4"}


def test_the_part_before_a_block() -> None:
    assert PLAN.before(0).levels == {"embeddings": "int8"}
    assert PLAN.before(1).levels == {"embeddings": "int8", "layer00.cache": "int4-window512"}
    assert PLAN.before(7) == Plan.of({**LEVELS, "layer03.ffn": "native"})
    assert PLAN.before(8) == PLAN


@pytest.mark.parametrize(
    "levels",
    [
        {"layer00.head": "int8"},
        {"layer00.attn": "int1"},
        {"layer00.cache": "int3"},
        {"layer00.cache": "window5"},
        {"layer00.cache": "native-"},
        {"embeddings": "removed"},
        {"embedding": "int8"},
    ],
)
def test_unknown_items_and_levels_are_rejected(levels: dict[str, str]) -> None:
    with pytest.raises(UnknownNameError):
        Plan.of(levels)


@pytest.mark.parametrize("text", ["", "3", '"layer00.attn"', "null", "[", '["layer00.attn"]'])
def test_other_json_is_rejected(text: str) -> None:
    with pytest.raises(ArtifactError):
        Plan.from_json(text)


@pytest.mark.parametrize("name", ["native", "int8", "int4", "int2", "window64", "int2-window32"])
def test_names_of_cache_levels(name: str) -> None:
    assert CacheLevel.of(name).name == name


@pytest.mark.parametrize("level", ["int8", "int4", "window64", "int4-window64"])
@pytest.mark.parametrize("model_window", [None, 31, 40, 127])
def test_groups_held_have_room_for_those_that_a_later_token_sees(
    level: str, model_window: int | None
) -> None:
    window = CacheLevel.of(level).window_tokens
    most = 0
    for tokens in range(1, 300):
        tail = (tokens - 1) // GROUP_TOKENS
        seen = set()
        for token in range(tail * GROUP_TOKENS):
            group = token // GROUP_TOKENS
            by_model = model_window is None or token >= tokens - model_window
            near = window is None or group >= tail - window // GROUP_TOKENS
            if by_model and (near or group == 0):
                seen.add(group)
        held = CacheLevel.of(level).groups_held(tokens, model_window)
        # Slots are reused, so that their number never falls; without a window all groups are seen.
        assert most <= held, tokens
        assert len(seen) <= held <= len(seen) + (model_window is not None), tokens
        assert held <= tail
        most = held


def test_an_int4_cache_takes_a_third_of_a_bfloat16_one() -> None:
    whole = 2 * 3 * 64 * 2 * 1024
    assert CacheLevel.of("int4").row_bytes(1024, 3, 64, 2) < 0.34 * whole
    assert CacheLevel.of("int8").row_bytes(1024, 3, 64, 2) < 0.56 * whole


INDICES = st.integers(0, 500)
MASKS = st.builds(Plan, st.frozensets(INDICES, max_size=20))


@pytest.mark.parametrize(
    "wrong",
    [
        *("layer00", "layer00.mlp", "layer-1.ffn", "Layer00.ffn", " layer00.ffn", "layer٣.ffn", ""),
        *(-1, 1.0, None, True, np.float64(2.0), np.True_),
    ],
)
def test_invalid_blocks_are_rejected(wrong: Any) -> None:
    for use in (block_index, Plan.removing, Plan().without, lambda block: Plan([block])):
        with pytest.raises(UnknownNameError, match=r"Unknown block .* written layerNN\.attn or"):
            use(wrong)


def test_a_misspelt_block_gets_a_suggestion() -> None:
    with pytest.raises(UnknownNameError, match=r"block 'layer00\.attm'; .*mean 'layer00\.attn'\?"):
        block_index("layer00.attm")


def test_numpy_integers_are_indices_and_become_plain_ones() -> None:
    mask = Plan.removing(np.int64(3), *np.array([5, 7]))
    assert mask == Plan.removing(3, 5, 7)
    assert {type(index) for index in sorted(mask.removed)} == {int}


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


@given(MASKS)
def test_a_model_must_have_the_items_of_a_plan(mask: Plan) -> None:
    size = max(mask.removed, default=-1) + 1
    assert mask.check(size) is mask
    if size > 1:
        with pytest.raises(UnknownNameError, match=f"'{block_name(size - 1)}'; known are 'layer00"):
            mask.check(size - 1)
    with pytest.raises(UnknownNameError):
        Plan.of({"layer04.cache": "int8"}).check(8)
