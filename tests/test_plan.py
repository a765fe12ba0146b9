"""Levels and compression plans."""

from __future__ import annotations

import pytest

from rap_env.errors import ArtifactError, UnknownNameError
from rap_env.levels import GROUP_TOKENS, CacheLevel
from rap_env.plan import Plan, item_names

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


def test_json_both_ways() -> None:
    assert Plan.from_json(PLAN.to_json()) == PLAN


def test_a_digest_tells_plans_apart() -> None:
    plans = [PLAN, Plan(), Plan.removing(3), Plan.removing(3, 4)]
    assert len({plan.digest for plan in plans}) == len(plans)
    assert Plan.of(dict(reversed(LEVELS.items()))).digest == PLAN.digest
    assert len(PLAN.digest) == 12


def test_a_summary_names_levels_with_ranges_of_layers() -> None:
    assert Plan().summary == "native"
    assert PLAN.summary == ("removed ffn 3; int8 attn 1; int4-window512 cache 0; int8 embeddings")
    assert Plan.removing(0, 2, 4, 10).summary == "removed attn 0-2 5"


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


def test_a_mask_is_a_plan() -> None:
    plan = Plan.removing(5)
    assert plan.is_mask
    assert plan.removed == {5}
    assert not PLAN.is_mask
    assert not Plan()
    assert PLAN


def test_the_same_level_everywhere() -> None:
    plan = Plan.uniform(3, weights="int4", caches="int8", embeddings="int8", removed=frozenset({0}))
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
        {"layer00.attn": "int3"},
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


def test_a_model_must_have_the_items_of_a_plan() -> None:
    assert PLAN.check(8) is PLAN
    for levels in ({"layer04.ffn": "int8"}, {"layer04.cache": "int8"}, {"layer04.attn": "removed"}):
        with pytest.raises(UnknownNameError):
            Plan.of(levels).check(8)


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
