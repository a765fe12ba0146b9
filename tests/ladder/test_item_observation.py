"""Observations with a row for each item of a ladder."""

import numpy as np
import pytest

from rap_env.ladder.features import ITEM_FEATURES, log_cost
from rap_env.ladder.items import ITEM_KINDS
from rap_env.plan import Plan
from rap_env.request import Request
from tests.policies import made_ladder

COLUMN = {name: number for number, name in enumerate(ITEM_FEATURES)}


@pytest.fixture
def builder():
    return made_ladder.encoder(spec={"levels": "all"})


def of(builder, plan, batch=2, tokens=2000, fraction=0.5):
    request = Request.at_fraction(builder.ladder_bytes.memory, batch, tokens, fraction)
    seen = builder.build(request, Plan.of(plan))
    assert builder.space.contains(seen)
    return request, seen


def test_fixed_columns_name_the_item(builder):
    _, seen = of(builder, {})
    for row, item in zip(seen["ladder"], builder.ladder.items, strict=True):
        assert row[: len(ITEM_KINDS)].tolist() == [kind == item.kind for kind in ITEM_KINDS]
        assert row[COLUMN["depth"]] == (item.layer or 0) / 2
        assert row[COLUMN["level"]] == 0
    assert seen["action_mask"].all()


def test_columns_of_the_next_level(builder):
    plan = {"layer00.cache": "int8", "layer01.ffn": "int8"}
    request, seen = of(builder, plan)
    memory, ladder = builder.ladder_bytes.memory, builder.ladder
    native = memory.native_peak_bytes(2, 2000)
    known = builder.importance
    for name, position in (("layer00.cache", 1), ("layer01.ffn", 1), ("layer02.ffn", 0)):
        number = ladder.numbers[name]
        item, row = ladder.items[number], seen["ladder"][number]
        assert row[COLUMN["level"]] == pytest.approx(position / (len(item.levels) - 1))
        before = Plan.of({**plan, "layer02.cache": "int4", "layer00.ffn": "int8"})
        freed = memory.peak_bytes(before, request) - memory.peak_bytes(
            before.lower({name: item.levels[position + 1]}), request
        )
        assert row[COLUMN["freed_share"]] == pytest.approx(freed / native)
        lower = number, position + 1
        assert row[COLUMN["one_shot_cost"]] == pytest.approx(log_cost(known.one_shot[lower]))
        assert row[COLUMN["order_place"]] == pytest.approx(known.place[lower])
        added = known.reached[lower] - known.reached[number, position]
        assert row[COLUMN["order_cost"]] == pytest.approx(log_cost(added))


def test_items_without_a_lower_level_have_no_next_one(builder):
    _, seen = of(builder, {"layer00.attn": "removed", "embeddings": "int8"})
    ladder = builder.ladder
    for name in ("layer00.attn", "layer00.cache", "embeddings"):
        row = seen["ladder"][ladder.numbers[name]]
        assert row[COLUMN["level"]] == 1
        assert not row[COLUMN["freed_share"] :].any()
    assert seen["action_mask"].sum() == len(ladder) - 3


def test_a_level_that_the_request_skips_is_not_the_next_one(builder):
    plan = {"layer00.cache": "int4"}
    number = builder.ladder.numbers["layer00.cache"]
    known = builder.importance
    for tokens, position in ((2000, 3), (300, 5)):  # window512, or window128
        _, seen = of(builder, plan, tokens=tokens)
        expected = log_cost(known.one_shot[number, position])
        assert seen["ladder"][number, COLUMN["one_shot_cost"]] == pytest.approx(expected)
    _, seen = of(builder, plan, tokens=64)
    assert not seen["action_mask"][number]


def test_costs_are_observed_on_a_log_scale():
    costs = np.array([-1.0, 0.0, 1e-5, 1e-3, 0.1, 10.0, np.inf])
    seen = log_cost(costs)
    assert seen[:2].tolist() == [0, 0]
    assert (np.diff(seen[1:6]) > 0.005).all()
    assert seen[-2:].tolist() == [1, 1]


def test_freed_bytes_are_those_of_all_caches_that_take_a_level_together():
    spec = {"levels": "all", "together": ["int8", "int4"]}
    builder = made_ladder.encoder(spec=spec)
    alone = made_ladder.encoder(spec={**spec, "together": []})
    assert builder.spec == {"layout": "ladder", **builder.ladder.spec}
    column, caches = COLUMN["freed_share"], list(builder.ladder.caches)
    for plan in ({}, {"layer01.attn": "removed"}, {"layer00.cache": "int8"}):
        request, seen = of(builder, plan)
        _, single = of(alone, plan)
        costs = builder.ladder_bytes.costs(request.batch_size, request.seq_len_tokens)
        state = costs.state(builder.ladder.positions(Plan.of(plan)))
        for item in filter(state.is_valid, range(len(builder.ladder))):
            after = state.preview(item)
            freed = state.peak_bytes - after.peak_bytes
            freed += after.shared_bytes - costs.shared.of(state._sharers)
            assert seen["ladder"][item, column] == pytest.approx(freed / costs.native_peak_bytes)
        assert (seen["ladder"][caches, column] > single["ladder"][caches, column]).any()
        single["ladder"][caches, column] = seen["ladder"][caches, column]
        assert (seen["ladder"] == single["ladder"]).all()
