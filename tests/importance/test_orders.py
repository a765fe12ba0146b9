"""The greedy order over the items of a ladder."""

import pytest

from rap_env.importance.orders import REFERENCE_SHAPE, greedy_order, one_shot_costs
from rap_env.ladder.items import Ladder
from rap_env.ladder.ladder_bytes import LadderBytes
from rap_env.memory import MemoryModel
from tests.policies.test_knapsack import costs, facts

CACHES = ("int8", "int4", "int4-window128")
LEVELS = {
    "weights": ["int8", "int4", "removed"], "caches": CACHES, "embeddings": ["int8"],
}  # fmt: skip


def made(packed=False, together=(), layers=3, seed=0, **changed):
    model = facts(layers=layers, packed=packed, **changed)
    memory = MemoryModel(model)
    found = costs(model, seed=seed, caches=CACHES)
    levels = {**LEVELS, "weights": ["removed"], "embeddings": []} if packed else LEVELS
    return found, LadderBytes(memory, Ladder.of(model, levels, together))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("together", [(), ("int8", "int4")])
def test_the_steps_lead_from_native_levels_to_the_lowest(packed, together):
    found, ladder_bytes = made(packed, together)
    order, ladder = greedy_order(found, ladder_bytes), ladder_bytes.ladder
    positions = [0] * len(ladder)
    for item, position in order.steps:
        assert position == positions[item] + 1
        positions[item] = position
    assert ladder.plan(positions) == ladder.lowest
    assert all(rise >= 0 for rise in order.rises)


def test_each_step_has_the_least_cost_per_freed_byte():
    found, ladder_bytes = made()
    order, ladder = greedy_order(found, ladder_bytes), ladder_bytes.ladder
    costs_there = ladder_bytes.costs(*REFERENCE_SHAPE)
    state = costs_there.state()

    def price(item: int) -> float:
        """The least cost per freed byte of all levels to which the item can go from here."""
        before, found_prices = ladder.plan(state.positions), []
        trial = costs_there.state(state.positions)
        freed = 0
        while trial.is_valid(item):
            freed += trial.freed_bytes(item)
            trial.lower(item)
            after = ladder.plan(trial.positions)
            added = max(0.0, found.delta_nll(after) - found.delta_nll(before))
            found_prices.append(added / freed)
        return min(found_prices)

    for (item, position), rise in zip(order.steps, order.rises, strict=True):
        prices = {n: price(n) for n in range(len(ladder)) if state.is_valid(n)}
        assert prices[item] == pytest.approx(min(prices.values()))
        before = found.delta_nll(ladder.plan(state.positions))
        state.lower(item)
        after = found.delta_nll(ladder.plan(state.positions))
        assert state.positions[item] == position
        assert rise == pytest.approx(max(0.0, after - before))


def test_levels_taken_together_are_steps_in_a_row():
    found, ladder_bytes = made(together=("int8",))
    order, ladder = greedy_order(found, ladder_bytes), ladder_bytes.ladder
    caches = set(ladder.caches)
    at = [n for n, (item, position) in enumerate(order.steps) if item in caches and position == 1]
    assert at == list(range(at[0], at[0] + len(caches)))


def test_an_observed_order_has_places_and_costs():
    found, ladder_bytes = made()
    order = greedy_order(found, ladder_bytes)
    seen = order.importance
    item, position = order.steps[0]
    assert seen.place[item, position] == 0
    item, position = order.steps[-1]
    assert seen.place[item, position] == 1
    for number, (item, position) in enumerate(order.steps):
        added = seen.reached[item, position] - seen.reached[item, position - 1]
        assert added == pytest.approx(order.rises[number])


def test_levels_that_were_not_measured_cost_as_much_as_the_one_above():
    found, ladder_bytes = made()
    ladder = Ladder.of(
        ladder_bytes.memory.facts, {"caches": ["int8", "int4", "int4-window512", "int4-window128"]}
    )
    known = one_shot_costs(found, ladder)
    assert known[:, 3].tolist() == known[:, 2].tolist()
    assert known[0, 4] == found.cost("layer00.cache", "int4-window128")
    assert (known[:, 0] == 0).all()
