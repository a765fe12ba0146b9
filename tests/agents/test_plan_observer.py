"""Batches of plans: the observations and bytes of single ones, and ways to a teacher's plans."""

import numpy as np
import pytest

from agents.trained_policy import PlanObserver
from rap_env.ladder.observation import ObservationEncoder, ObservedState
from rap_env.plan import Plan
from rap_env.request import Request
from tests.agents.policies import encoder_for
from tests.policies import made_ladder

TOGETHERS = [(), ("int8", "int4"), ("int8", "int4", "int4-window512"), ("int4",)]
SHAPES = [(2, 2000, 0.5), (1, 64, 0.8), (2, 2000, 0.3), (8, 300, 0.4)]


def encoder_of(together=()) -> ObservationEncoder:
    return made_ladder.encoder(spec={"levels": "all", "together": together})


def requests_of(builder) -> list[Request]:
    memory = builder.ladder_bytes.memory
    longest = memory.facts.max_positions
    return [Request.at_fraction(memory, b, min(n, longest), f) for b, n, f in SHAPES]


@pytest.mark.parametrize("items", [*TOGETHERS, "context", "real_context"], ids=str)
def test_it_is_exactly_the_single_builder_and_tracker_on_random_ways(request, items):
    if isinstance(items, str):
        builder = encoder_for(request.getfixturevalue(items))
    else:
        builder = encoder_of(items)
    requests = requests_of(builder)
    observer, rng = PlanObserver(builder, requests), np.random.default_rng(1)
    which = rng.integers(len(requests), size=12)
    asked = [requests[index] for index in which]
    single = [ObservedState(builder, request) for request in asked]
    state, visited = observer.start(len(which)), set()
    for _ in range(60):
        seen, over = observer.observe(which, state), observer.over_bytes(which, state)
        for row, (request, walked) in enumerate(zip(asked, single, strict=True)):
            plan = observer.ladder.plan(state[row].tolist())
            assert state[row].tolist() == walked.state.positions
            for key, array in builder.build(request, plan).items():
                assert np.array_equal(seen[key][row], array)
                if key != "request":
                    assert np.array_equal(walked.observation[key], array)
            assert over[row] == max(0, walked.state.peak_bytes - request.budget_bytes)
        actions = rng.integers(len(builder.ladder), size=len(which))  # invalid ones change nothing
        for walked, action in zip(single, actions.tolist(), strict=True):
            if walked.state.is_valid(action):
                walked.lower(action)
        state = observer.act(which, state, actions)
        visited |= set(map(tuple, state.tolist()))
    assert len(visited) > (30 if isinstance(items, str) else 100)


def target_of(builder, levels) -> np.ndarray:
    return np.array(builder.ladder.positions(Plan.of(levels)))


@pytest.mark.parametrize("together", TOGETHERS[:3], ids=str)
def test_right_actions_lead_to_the_target_and_nowhere_else(together):
    builder = encoder_of(together)
    observer, rng = PlanObserver(builder, requests_of(builder)), np.random.default_rng(0)
    levels = {"layer00.attn": "removed", "layer01.ffn": "int4", "embeddings": "int8",
              "layer01.cache": "int4", "layer02.cache": "int4"}  # fmt: skip
    target, which = target_of(builder, levels)[None], np.zeros(1, dtype=np.int64)
    distance = len(observer.ways(which, target, rng)[0])
    shared = len({"int8", "int4"} & set(together))
    assert distance == 3 + 2 + 1 + shared + 2 * (2 - shared)
    for _ in range(20):
        state, steps = observer.start(1), 0
        while (right := observer.right_actions(which, state, target)).any():
            action = rng.choice(np.flatnonzero(right[0]))
            state = observer.act(which, state, np.array([action]))
            steps += 1
        assert np.array_equal(state, target)
        assert steps == distance


def test_a_level_that_the_request_skips_is_not_on_the_way():
    builder = encoder_of()
    observer = PlanObserver(builder, requests_of(builder))
    target = target_of(builder, {"layer01.cache": "int4-window128"})[None]
    rng = np.random.default_rng(0)
    steps = [len(observer.ways(np.array([n]), target, rng)[0]) for n in range(len(SHAPES))]
    assert steps == [5, 2, 5, 3]


@pytest.mark.parametrize("together", TOGETHERS, ids=str)
def test_ways_lead_from_the_native_plan_to_the_target_by_right_actions(together):
    builder = encoder_of(together)
    observer, rng = PlanObserver(builder, requests_of(builder)), np.random.default_rng(0)
    which = np.zeros(400, dtype=np.int64)
    levels = {"layer00.attn": "removed", "layer01.ffn": "removed", "layer02.cache": "int4"}
    targets = np.repeat(target_of(builder, levels)[None], 400, axis=0)
    ways, states, right = observer.ways(which, targets, rng)
    assert right.any(axis=1).all()
    assert np.array_equal(right, observer.right_actions(which[ways], states, targets[ways]))
    cache = builder.ladder.numbers["layer00.cache"]
    inside = states <= np.maximum(targets[ways], states * (targets[ways] == 0))
    assert np.delete(inside, cache, axis=1).all()
    assert len(np.unique(states, axis=0)) > 15
    for number in range(3):
        way = states[ways == number]
        assert not way[0].any()
        for before, after, allowed in zip(way, way[1:], right[ways == number], strict=False):
            reached = [observer.act(which[:1], before[None], np.array([item]))[0]
                       for item in np.flatnonzero(allowed)]  # fmt: skip
            assert any(np.array_equal(after, each) for each in reached)
    assert np.array_equal(observer.ways(which, targets, np.random.default_rng(0))[1], states)
