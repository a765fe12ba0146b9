"""The network in NumPy; `tests/agents/test_export.py` compares it with the trained one."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from rap_env.errors import ArtifactError
from rap_env.plan import Plan
from rap_env.policies.network import PolicyNetwork
from rap_env.policies.network_rows import _NEAR_ITEMS, BLOCK_ROWS, ITEM_ROWS, ROWS
from rap_env.request import Request
from tests.policies import made_ladder, made_policies
from tests.policies.made_policies import drawn_weights, memory

MADE = {"blocks": made_policies, "ladder": made_ladder}
SHAPES = [(1, 10), (16, 2000), (4, 500)]


def network(rows, **settings):
    encoder = MADE[rows].encoder()
    return PolicyNetwork(drawn_weights(rows, len(encoder.ladder), **settings), encoder)


def requests(model, fractions=(0.3, 0.5, 0.7, 0.9, 0.99)):
    return [Request.at_fraction(model, *shape, f) for shape in SHAPES for f in fractions]


def test_neighbours_are_the_items_of_the_same_and_of_adjacent_layers():
    encoder = made_ladder.encoder()
    rows = encoder.build(Request(1, 1, 1), Plan())["ladder"]
    names = {(item.layer, item.kind): number for number, item in enumerate(encoder.ladder.items)}
    for item, near in zip(encoder.ladder.items, ITEM_ROWS.neighbours(rows), strict=True):
        expected = [
            -1 if item.layer is None else names.get((item.layer + step, kind), -1)
            for step, kind in _NEAR_ITEMS
        ]
        assert near.tolist() == expected
    assert BLOCK_ROWS.neighbours(np.zeros((4, 7), np.float32)).tolist() == [
        [-1, -1, 1, 2], [-1, 0, 2, 3], [0, 1, 3, -1], [1, 2, -1, -1],
    ]  # fmt: skip


@pytest.mark.parametrize("vectors", [0, 3])
@pytest.mark.parametrize("rows", ROWS)
def test_it_stops_at_the_first_plan_that_fits(rows, vectors):
    made = network(rows, vectors=vectors)
    model, plans = made.encoder.memory, set()
    for request in requests(model):
        plan = made.plan(request)
        costs = made.encoder.ladder_bytes.costs(request.batch_size, request.seq_len_tokens)
        if costs.least_peak_bytes <= request.budget_bytes:
            assert model.peak_bytes(plan, request) <= request.budget_bytes
            plans.add(plan)
        else:
            assert model.peak_bytes(plan, request) == costs.least_peak_bytes
    assert len(plans) > 5
    assert made.plan(Request.at_fraction(model, 1, 10, 1.0)) == Plan()
    lowest = made.plan(Request(1, 10, 1))
    assert model.peak_bytes(lowest, Request(1, 10, 1)) == costs_at(made).least_peak_bytes


def costs_at(made):
    return made.encoder.ladder_bytes.costs(1, 10)


def test_without_the_request_the_order_is_static():
    for without, static in ((("request",), True), ((), False)):
        made = network("blocks", without=without)
        plans = sorted((made.plan(r).removed for r in requests(memory())), key=len)
        assert static == all(one <= other for one, other in itertools.pairwise(plans))


@pytest.mark.parametrize("rows", ROWS)
def test_threads_share_it_and_it_keeps_no_state(rows):
    made = network(rows, vectors=3)
    asked = requests(made.encoder.memory) * 10
    alone = [made.plan(request) for request in asked]
    assert alone == [made.plan(request) for request in reversed(asked)][::-1]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(made.plan, asked)) == alone


def test_weights_of_a_training_that_diverged_are_rejected():
    with pytest.raises(ArtifactError, match="last_weight contains NaN"):
        replace(drawn_weights("blocks", 12), last_weight=np.full(8, np.nan, np.float32))
