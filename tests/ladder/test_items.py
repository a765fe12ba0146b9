"""Ladders: which items have which levels, and lowering one item by one level."""

from dataclasses import replace

import numpy as np
import pytest

from rap_env.errors import InvalidRequestError, UnknownNameError
from rap_env.ladder.items import Ladder
from rap_env.ladder.steps import LevelSteps
from rap_env.levels import LADDERS
from rap_env.plan import Plan, item_names
from tests.policies.test_knapsack import facts

LAYERS = 2
UNPACKED, PACKED = facts(), facts(packed=True)


def next_positions(ladder, plan):
    """The position of the next level of each item, -1 without one."""
    nexts = zip(LevelSteps.every(ladder).nexts, ladder.positions(plan), strict=True)
    return [levels[position] for levels, position in nexts]


def lowered(ladder, plan, item):
    """The plan after an item and all that are taken together with it are lowered."""
    positions = ladder.positions(plan)
    return ladder.plan(LevelSteps.every(ladder).after(positions, ladder.numbers[item]))


def test_items_are_in_the_order_of_the_names_of_items():
    ladder = Ladder.of(UNPACKED)
    assert tuple(item.name for item in ladder.items) == item_names(LAYERS)
    assert [item.kind for item in ladder.items] == [
        "attn", "ffn", "attn", "ffn", "cache", "cache", "embeddings",
    ]  # fmt: skip
    assert all(ladder.numbers[item.name] == n for n, item in enumerate(ladder.items))


def test_masks_number_their_items_as_blocks():
    ladder = Ladder.of(PACKED, "masks")
    assert [item.levels for item in ladder.items] == [("native", "removed")] * 2 * LAYERS
    assert tuple(item.name for item in ladder.items) == item_names(LAYERS)[: 2 * LAYERS]


def test_weights_have_the_levels_that_exist():
    levels = {item.name: item.levels for item in Ladder.of(PACKED).items}
    for index, name in enumerate(item_names(LAYERS)[: 2 * LAYERS]):
        assert levels[name] == tuple(PACKED.weight_levels(index))
    assert ("embeddings" in levels) == (len(PACKED.embedding_levels) > 1)
    assert set(levels["layer00.cache"][1:]) == set(LADDERS["all"]["caches"])


def test_int4_stands_in_for_a_compact_level_that_does_not_exist():
    blocks = UNPACKED.level_param_bytes
    assert "int4-compact" not in blocks
    assert spec_free(Ladder.of(UNPACKED)) == spec_free(Ladder.of(UNPACKED, "four-bits"))
    first = (1, *(0 for _ in blocks["int4"][1:]))  # of the first block alone
    more = replace(UNPACKED, level_param_bytes={**blocks, "int4-compact": first, "int2": first})
    levels = [item.levels for item in Ladder.of(more).items]
    assert levels[0] == ("native", "int8", "int4-compact", "int2", "removed")
    assert levels[1] == ("native", "int8", "int4", "removed")
    asked = {"weights": ["int4", "int4-compact"]}
    levels = [item.levels for item in Ladder.of(more, asked).items]
    assert levels[:2] == [("native", "int4", "int4-compact"), ("native", "int4")]


def spec_free(ladder):
    """What a ladder has, whatever was asked for."""
    return [(item.name, item.levels) for item in ladder.items]


def test_an_explicit_ladder_has_what_it_names():
    ladder = Ladder.of(UNPACKED, {"weights": ["native", "int8"], "caches": ["int4"]})
    assert {item.levels for item in ladder.items} == {("native", "int8"), ("native", "int4")}
    assert ladder.cache_levels == ("int4",)
    assert Ladder.of(UNPACKED, "masks").cache_levels == ()


@pytest.mark.parametrize(
    ("levels", "error", "message"),
    [
        ({"cache": ["int8"]}, UnknownNameError, "setting of levels: 'cache'.*mean 'caches'"),
        ({"weights": ["int5"]}, UnknownNameError, "level of weights 'int5'"),
        ({"embeddings": ["removed"]}, UnknownNameError, "level of embeddings 'removed'"),
        ({"caches": ["int4-window7"]}, UnknownNameError, "level of a cache 'int4-window7'"),
        ({"caches": ["int4-window256", "int2"]}, InvalidRequestError, "no longer window"),
    ],
)
def test_wrong_levels_are_one_clear_error(levels, error, message):
    with pytest.raises(error, match=message):
        Ladder.of(UNPACKED, levels)


def test_lowering_goes_through_all_levels_of_an_item():
    ladder, plan = Ladder.of(UNPACKED), Plan()
    for item in ladder.items:
        for level in item.levels[1:]:
            assert item.levels[next_positions(ladder, plan)[ladder.numbers[item.name]]] == level
            plan = lowered(ladder, plan, item.name)
            if item.kind != "cache":  # the removal of attention blocks came first
                assert plan.levels[item.name] == level
        if item.kind == "ffn":
            break  # caches of later layers shall not be gone
    assert next_positions(ladder, plan)[:2] == [-1, -1]


def test_a_removed_attention_block_takes_its_cache_with_it():
    ladder = Ladder.of(UNPACKED)
    plan = lowered(ladder, Plan.of({"layer00.cache": "int8"}), "layer00.cache")
    plan = plan.without("layer00.attn")
    valid = np.array(next_positions(ladder, plan)) >= 0
    assert not valid[ladder.numbers["layer00.cache"]]
    assert not valid[ladder.numbers["layer00.attn"]]
    assert valid.sum() == len(ladder) - 2
    assert ladder.counterparts[0] == ladder.numbers["layer00.cache"]
    assert ladder.counterparts[ladder.numbers["layer00.cache"]] == 0


def test_some_levels_are_taken_together():
    ladder = Ladder.of(UNPACKED, "all", ["int8"])
    plan = lowered(ladder, Plan(), "layer00.cache")
    assert plan == Plan.of({"layer00.cache": "int8", "layer01.cache": "int8"})
    assert lowered(ladder, plan, "layer01.cache").levels["layer00.cache"] == "int8"
    one = Plan.of({"layer00.cache": "int4"})  # caches that are lower stay as they are
    assert lowered(ladder, one, "layer01.cache").levels == {
        "layer00.cache": "int4",
        "layer01.cache": "int8",
    }
    assert lowered(ladder, Plan(), "layer00.ffn").levels == {"layer00.ffn": "int8"}
    assert Ladder.of(UNPACKED, "masks", ["int8"]).shared_positions == frozenset()
    with pytest.raises(UnknownNameError, match="level of a cache 'int9'"):
        Ladder.of(UNPACKED, "all", ["int9"])
    with pytest.raises(InvalidRequestError, match="must be a list of levels"):
        Ladder.of(UNPACKED, "all", "int8")


@pytest.mark.parametrize("together", [(), ("int8", "int4")])
def test_raising_inverts_lowering(together):
    ladder = Ladder.of(UNPACKED, "four-bits", together)
    steps, rng = LevelSteps.every(ladder), np.random.default_rng(0)
    raised_items = 0
    for _ in range(40):
        positions = [0] * len(ladder)
        for item in rng.integers(len(ladder), size=20).tolist():
            if steps.nexts[item][positions[item]] >= 0:
                positions = steps.after(positions, item)
        for item, position in enumerate(positions):
            higher = steps.raised(positions, item)
            if higher is not None and position != ladder.removals[item]:
                assert steps.after(higher, item) == positions
                raised_items += 1
            elif higher is None and position and not ladder.shared_positions:
                assert position == len(ladder.items[item].levels), "its block is removed"
    assert raised_items


def test_the_cache_of_a_restored_block_returns_at_a_level_of_the_others():
    ladder = Ladder.of(UNPACKED, "four-bits")
    other = Plan.of({"layer01.cache": "int4"})
    positions = ladder.positions(Plan.of({"layer00.attn": "removed", "layer01.cache": "int4"}))
    attn = ladder.numbers["layer00.attn"]
    higher = ladder.plan(LevelSteps.every(ladder).raised(positions, attn))
    assert higher.levels == {**other.levels, "layer00.attn": "int4", "layer00.cache": "int4"}
    native = LevelSteps.every(ladder).raised(positions, attn, cache_position=0)
    assert ladder.plan(native).levels == {**other.levels, "layer00.attn": "int4"}


def test_positions_and_plans_are_the_same_thing():
    ladder, rng = Ladder.of(UNPACKED), np.random.default_rng(0)
    for _ in range(50):
        drawn = [int(rng.integers(len(item.levels))) for item in ladder.items]
        plan = ladder.plan(drawn)
        assert plan == Plan.of(
            {i.name: i.levels[p] for i, p in zip(ladder.items, drawn, strict=True)}
        )
        assert ladder.plan(ladder.positions(plan)) == plan
    lowest = [len(item.levels) - 1 for item in ladder.items]
    assert ladder.plan(lowest) == ladder.lowest
    assert len(ladder.lowest.removed) == 2 * LAYERS


def test_a_plan_of_another_ladder_is_rejected():
    ladder = Ladder.of(UNPACKED, "masks")
    with pytest.raises(UnknownNameError, match=r"level of layer00\.ffn in the ladder 'int8'"):
        ladder.positions(Plan.of({"layer00.ffn": "int8"}))
    with pytest.raises(UnknownNameError, match=r"level of layer00\.cache in the ladder 'int8'"):
        ladder.positions(Plan.of({"layer00.cache": "int8"}))
