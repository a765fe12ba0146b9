"""Bytes while items are lowered: equal to the memory model's for every plan, to the byte."""

import numpy as np
import pytest

from rap_env.errors import InvalidRequestError
from rap_env.ladder.items import Ladder
from rap_env.ladder.ladder_bytes import LadderBytes
from rap_env.ladder.state import ShapeRow, StackedCosts
from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.request import Request
from tests.masks import every_mask
from tests.policies.test_knapsack import facts
from tests.tiny import FAMILIES, tiny_llm

SHAPES = [(1, 1), (1, 33), (3, 200), (64, 1000), (2, 4096)]
MADE = {
    "unquantised": facts(layers=3),
    "packed": facts(layers=3, packed=True),
    "windows of the model": facts(layers=3, kv_window_tokens=(None, 40, 700)),
    "unequal caches": facts(
        layers=3, kv_heads=(2, 1, 4), kv_bytes_per_token=(256, 128, 512), ffn_width=4000
    ),
}
LADDERS = ["all", "masks", "caches", {"weights": ["int8"], "caches": ["int4", "int4-window128"]}]


def freed_bytes(stacked, positions, shape=0) -> list:
    """What lowering each item of plans frees."""
    items, others = np.arange(len(stacked.ladder)), stacked.ladder.counterpart_array
    levels = stacked.levels(items, positions)
    places = stacked.in_steps(levels, shape)
    return stacked.freed_bytes(items, levels, places, positions[..., others], shape).tolist()


def walk(memory, ladder, shape, seed, start=None):
    """Lower random items until none is valid; compare with the memory model at each step."""
    costs, request = LadderBytes(memory, ladder).costs(*shape), Request(*shape, 1)
    rng, tracker = np.random.default_rng(seed), costs.state(start)
    plan = ladder.plan(tracker.positions)
    assert tracker.peak_bytes == memory.peak_bytes(plan, request)
    while valid := [n for n in range(len(ladder)) if tracker.is_valid(n)]:
        item = int(rng.choice(valid))
        all_freed = freed_bytes(costs.stacked, np.array(tracker.positions))
        assert all_freed == list(map(tracker.freed_bytes, range(len(ladder))))
        expected, held = tracker.preview(item).peak_bytes, tracker.freed_bytes(item)
        tracker.lower(item)
        plan = ladder.plan(tracker.positions)
        assert tracker.peak_bytes == expected == memory.peak_bytes(plan, request), plan
        assert ladder.positions(plan) == tracker.positions
        if ladder.items[item].kind == "cache":
            assert held > 0
    assert tracker.positions == costs.steps.lowest
    assert tracker.peak_bytes == costs.least_peak_bytes
    return tracker


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("levels", LADDERS, ids=str)
@pytest.mark.parametrize("name", MADE)
def test_each_step_has_the_bytes_of_the_memory_model(name, levels, shape):
    made = MADE[name]
    if isinstance(levels, dict) and name == "packed":
        levels = {**levels, "weights": []}
    memory, ladder = MemoryModel(made), Ladder.of(made, levels)
    for seed in range(4):
        walk(memory, ladder, shape, seed)
        walk(memory, Ladder.of(made, levels, ["int8", "int4-window128"]), shape, seed)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", MADE)
def test_all_masks_have_the_bytes_of_the_memory_model(name, shape):
    memory, request = MemoryModel(MADE[name]), Request(*shape, 1)
    costs = LadderBytes(memory, Ladder.of(memory.facts, "masks")).costs(*shape)
    masks = list(every_mask(memory.facts.num_blocks))
    positions = np.array([costs.ladder.positions(mask) for mask in masks])
    peaks = [memory.peak_bytes(mask, request) for mask in masks]
    assert costs.peaks(positions).tolist() == peaks
    assert [costs.state(row).peak_bytes for row in positions.tolist()] == peaks
    assert costs.native_peak_bytes == memory.native_peak_bytes(*shape)
    assert costs.kv_cache_bytes == memory.breakdown(Plan(), request).kv_cache
    assert costs.least_peak_bytes == memory.peak_bytes_without_blocks(request)
    assert freed_bytes(costs.stacked, positions[0]) == memory.freed_bytes(request).tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_each_step_has_the_bytes_of_the_memory_model_in_all_families(family):
    made = tiny_llm(family).facts
    memory, ladder = MemoryModel(made), Ladder.of(made)
    for seed, shape in enumerate([(1, 1), (2, 40), (5, 64)]):
        walk(memory, ladder, shape, seed)


def test_levels_that_need_no_fewer_bytes_are_skipped():
    made = MADE["packed"]
    memory, ladder = MemoryModel(made), Ladder.of(made, "caches")
    levels = ladder.items[0].levels

    def reached(tokens: int) -> list[str]:
        tracker, found = LadderBytes(memory, ladder).costs(1, tokens).state(), []
        while tracker.is_valid(0):
            tracker.lower(0)
            found.append(levels[tracker.positions[0]])
        return found

    assert reached(32) == []  # all of it is in the tail
    assert reached(300) == ["int8", "int4", "int4-window128"]
    assert reached(4096) == list(levels[1:])


@pytest.mark.parametrize("together", [(), ("int8", "int4", "int4-window256")])
@pytest.mark.parametrize("name", MADE)
def test_stacked_costs_have_the_bytes_and_moves_of_single_states(name, together):
    made, rng = MADE[name], np.random.default_rng(0)
    memory, ladder = MemoryModel(made), Ladder.of(made, "all", together)
    made_bytes = LadderBytes(memory, ladder)
    costs = [made_bytes.costs(*shape) for shape in SHAPES]
    shapes = np.arange(len(SHAPES))
    stacked = StackedCosts(
        made_bytes.tables, np.zeros((len(ShapeRow), len(SHAPES)), dtype=np.int64)
    )
    for rows in (shapes[:2], shapes[2:]):
        stacked.put(rows, made_bytes.stacked(*np.array(SHAPES)[rows].T))
    assert stacked.native_peak_bytes.tolist() == [memory.native_peak_bytes(*s) for s in SHAPES]
    assert stacked.least_peak_bytes.tolist() == [entry.least_peak_bytes for entry in costs]
    start = ladder.positions(Plan.of({"layer01.cache": "int8"}))
    states = [entry.state(start if row else None) for row, entry in enumerate(costs)]
    for _ in range(60):
        positions = np.array([state.positions for state in states])
        assert stacked.peaks(positions, shapes).tolist() == [s.peak_bytes for s in states]
        freed = [list(map(state.freed_bytes, range(len(ladder)))) for state in states]
        assert freed_bytes(stacked, positions, shapes[:, None]) == freed
        items = rng.integers(len(ladder), size=len(states))
        after = stacked.lowered(positions, items, shapes)
        for state, item in zip(states, items.tolist(), strict=True):
            if state.is_valid(item):
                state.lower(item)
        assert after.tolist() == [state.positions for state in states]


def test_costs_are_cached_read_only_and_checked():
    made = MADE["packed"]
    found = LadderBytes(MemoryModel(made), Ladder.of(made))
    costs = found.costs(2, 30)
    assert found.costs(2, 30) is costs
    with pytest.raises(ValueError, match="read-only"):
        costs.item_bytes[0, 0] = 0
    with pytest.raises(InvalidRequestError, match="4096 tokens"):
        found.costs(1, 5000)
