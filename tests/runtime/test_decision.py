"""Decisions as tables: a snapshot in, actions out; and that deciding, acting and measuring end."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.policies.knapsack import KnapsackPolicy
from rap_env.policies.loading import OrderPolicy
from rap_env.runtime.decision import (
    Action,
    Admit,
    Apply,
    Borrow,
    EndRefill,
    FreeKept,
    Preempt,
    Progress,
    Snapshot,
    Trim,
    Wait,
    available_bytes,
    decide,
)
from rap_env.runtime.memory_estimator import EMPTY_BATCH, UNKNOWN_PASS, BatchShape, MemoryEstimator
from rap_env.runtime.plan_chooser import PlanChooser
from rap_env.runtime.records import ControllerSettings
from tests.policies.test_knapsack import costs as level_costs
from tests.runtime.harness import ORDER, SHAPE
from tests.tiny import tiny_llm

NATIVE, ONE_ROW, LOWERED = Plan(), BatchShape(1, 40), Plan.removing(*ORDER[:3])
DONE = Progress(trimmed=True)
TRIED = Progress(trimmed=True, exact=True, attempts=4)


@pytest.fixture(scope="module")
def costs():
    """What plans cost, by a policy that removes blocks in a known order."""
    llm = tiny_llm(layers=3)
    estimator = MemoryEstimator(llm)
    # Lowering what is kept takes no more than a pass, as with real models.
    estimator.lowering_bytes = 0
    policy = OrderPolicy(estimator.memory, ORDER)
    return PlanChooser(llm, policy, estimator, ControllerSettings(guard_order=ORDER))


class Table:
    """Snapshots of a model whose measured bytes are as predicted."""

    def __init__(self, costs):
        self.costs, self.estimator = costs, costs.estimator

    def need(self, plan, shape=SHAPE):
        return self.estimator.peak_bytes(plan, shape)

    def budget(self, count, shape=SHAPE):
        """A budget for which the first `count` blocks must be removed."""
        return self.need(Plan.removing(*ORDER[:count]), shape)

    def decide(self, budget_bytes, kept_bytes=0, used_bytes=0, **known):
        known = {"running": SHAPE, "newest": "newest", **known}
        held = {"used_bytes": used_bytes + kept_bytes, "held_bytes": kept_bytes}
        return decide(
            Snapshot(budget_bytes=budget_bytes, kept_bytes=kept_bytes, **held, **known), self.costs
        )


@pytest.fixture
def table(costs):
    return Table(costs)


def apply(count, trigger):
    return Apply(Plan.removing(*ORDER[:count]), trigger)


@pytest.mark.parametrize(
    ("blocks", "known", "actions"),
    [
        # The plan fits.
        (0, {}, ()),
        (3, {"plan": LOWERED}, ()),
        # The limit fell.
        (3, {}, (apply(3, "budget_fell"),)),
        (5, {"plan": LOWERED}, (apply(5, "budget_fell"),)),
        (3, {"refills": True}, (EndRefill(),)),
        (3, {"floor": 1.0}, (Preempt("newest"),)),  # the policy predicts nothing
        (3, {"progress": TRIED}, (Preempt("newest"),)),
        (3, {"progress": replace(TRIED, attempts=3)}, (apply(3, "budget_fell"),)),
        # There is headroom, but not long enough, or too little to be of use.
        (1, {"plan": LOWERED}, ()),
        (1, {"plan": LOWERED, "lasting_bytes": 1, "progress": DONE}, ()),
        (0, {"plan": LOWERED, "lasting_bytes": 10**9}, (Trim(),)),
        (1, {"plan": LOWERED, "lasting_bytes": 10**9, "progress": DONE}, (apply(1, "room"),)),
        (1, {"plan": LOWERED, "lasting_bytes": 10**9, "readable": False}, ()),
        (1, {"plan": LOWERED, "lasting_bytes": 10**9, "progress": replace(TRIED, attempts=1)}, ()),
    ],
)
def test_what_follows_for_the_batch_that_runs(table, blocks, known, actions):
    """Columns: blocks that the budget makes one remove, what else is known, and the actions."""
    assert table.decide(table.budget(blocks), **known) == actions


@pytest.mark.parametrize(
    ("blocks", "known", "actions"),
    [
        (0, {}, (Admit("new"),)),
        (3, {}, (apply(3, "arrival"),)),
        (3, {"running": ONE_ROW}, (apply(3, "arrival"),)),
        (3, {"plan": LOWERED}, (Admit("new"),)),
        (1, {"plan": LOWERED}, (apply(1, "arrival"),)),  # nothing runs: a better plan at once
        (1, {"plan": LOWERED, "spare_bytes": 10**9}, (Admit("new"),)),
        (1, {"plan": LOWERED, "running": ONE_ROW}, (Admit("new"),)),
        (1, {"plan": LOWERED, "readable": False}, (Admit("new"),)),
    ],
)
def test_what_follows_for_a_request_that_may_begin(table, blocks, known, actions):
    known = {"running": EMPTY_BATCH, "joined": SHAPE, "request": "new", **known}
    assert table.decide(table.budget(blocks), **known) == actions


def test_a_request_waits_for_what_was_too_little_before(table):
    budget = table.need(Plan.removing(*ORDER)) - 1
    asked = {"running": EMPTY_BATCH, "joined": SHAPE, "request": "new"}
    assert table.decide(budget, **asked) == (Wait(budget),)
    enough = table.budget(2)
    assert table.decide(enough, rejected_bytes=enough, **asked) == (Wait(enough),)
    assert table.decide(enough, rejected_bytes=enough - 1, **asked) == (apply(2, "arrival"),)


def test_an_empty_batch_that_fits_nowhere_removes_all_that_the_guard_may(table):
    idle = {"running": EMPTY_BATCH, "newest": None}
    least = Plan.removing(*ORDER)
    assert table.decide(1, **idle) == (Apply(least, "budget_fell"),)
    assert table.decide(1, plan=least, **idle) == ()
    assert table.decide(1, progress=replace(TRIED, unread=True), **idle) == ()


def test_a_minute_without_requests_restores_all_that_fits(table):
    idle = {"running": EMPTY_BATCH, "newest": None, "plan": LOWERED, "rests": True}
    budget = table.need(NATIVE, EMPTY_BATCH)
    assert table.decide(budget, **idle) == (Trim(),)
    assert table.decide(budget, progress=DONE, **idle) == (Apply(NATIVE, "room"),)


def test_measured_bytes_beside_tensors_count_where_the_next_pass_could_exceed_the_budget(costs):
    budget, estimator = 10**6, costs.estimator
    estimate = estimator.pass_estimate(NATIVE, SHAPE, UNKNOWN_PASS)
    excess = estimate.workspace - estimator.workspace_bytes(SHAPE)
    most = budget - estimate.total
    for used, held, counts in ((0, 0, False), (most, 0, False), (most + 1, 0, True),
                               (budget, 0, True), (budget, budget, True)):  # fmt: skip
        known = {"used_bytes": used, "held_bytes": held, "margin_bytes": 10}
        snapshot = Snapshot(running=SHAPE, budget_bytes=budget, **known)
        reserved = max(10, used - held + excess) if counts else 10
        assert available_bytes(snapshot, costs) == budget - reserved


# What is kept goes first


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_what_is_kept_is_freed_before_anything_is_lowered(table, share):
    kept, room = 100_000, int(share * 100_000)
    budget = table.need(NATIVE) + room
    freeing = () if share == 1 else (FreeKept(kept - room),)
    assert table.decide(budget, kept, progress=DONE) == freeing
    assert table.decide(budget, kept) == (() if share == 1 else (Trim(),))
    everything = replace(DONE, freed=True)
    assert table.decide(budget, kept, progress=everything) == ()


def test_what_is_kept_makes_room_for_a_better_plan(table):
    kept = 100_000
    budget = table.need(LOWERED) + kept
    known = {"plan": LOWERED, "lasting_bytes": 10**9, "progress": DONE}
    better = table.costs.choose(SHAPE, budget, 1e9)
    excess = kept - (budget - table.need(better))
    assert table.decide(budget, kept, **known) == (FreeKept(excess), Apply(better, "room"))


@pytest.mark.parametrize(
    ("progress", "running", "actions"),
    [
        (Progress(), ONE_ROW, (Trim(),)),
        (DONE, ONE_ROW, (FreeKept(1000, at_once=False),)),
        (replace(DONE, unfinished=True), ONE_ROW, (Wait(),)),  # what runs goes on
        (replace(DONE, unfinished=True), EMPTY_BATCH, (FreeKept(1000, at_once=False),)),
        (replace(DONE, freed=True), ONE_ROW, (Admit("new"),)),  # no more can be freed
        (replace(DONE, freed=True), EMPTY_BATCH, (Admit("new"),)),
    ],
)
def test_a_request_waits_while_what_is_kept_is_lowered(table, progress, running, actions):
    kept = 5000
    budget = table.need(NATIVE) + kept - 1000
    asked = {"running": running, "joined": SHAPE, "request": "new", "progress": progress}
    assert table.decide(budget, kept, **asked) == actions


# The reserve


@pytest.mark.parametrize(
    ("missing", "known", "actions"),
    [
        (1, {"running": ONE_ROW}, (Borrow(250),)),
        (300, {"running": ONE_ROW, "borrowed_bytes": 250}, (Borrow(500),)),
        (1001, {"running": ONE_ROW}, (Preempt("newest"),)),  # not even with all of it
        (1, {"running": SHAPE}, (Preempt("newest"),)),  # another row can still be preempted
        (1, {"running": EMPTY_BATCH, "joined": ONE_ROW, "stalled": True}, (Borrow(250),)),
        (
            1001,
            {"running": EMPTY_BATCH, "joined": ONE_ROW, "stalled": True, "borrowed_bytes": 1000},
            (Borrow(0), Wait(-1)),
        ),
        (0, {"running": ONE_ROW, "borrowed_bytes": 250}, (Borrow(0),)),  # it fits without
    ],
)
def test_the_last_row_and_a_stalled_request_use_the_reserve(table, missing, known, actions):
    shape = known.get("joined") or known["running"]
    least = Plan.removing(*ORDER)
    budget = table.need(least, shape) - missing + known.get("borrowed_bytes", 0)
    (*first, last) = table.decide(budget, plan=least, reserve_bytes=1000, **known)
    if isinstance(last, Wait):
        last = Wait(-1)
    assert (*first, last) == actions


# It ends


@pytest.fixture(scope="module")
def predicting():
    """What plans cost, by a policy that predicts them."""
    llm = tiny_llm(layers=2)
    memory = MemoryModel(llm)
    policy = KnapsackPolicy(memory, level_costs(memory.facts, caches=("int8", "int4")))
    return PlanChooser(llm, policy, MemoryEstimator(llm), ControllerSettings())


SIZES = st.integers(0, 300_000)
SHAPES = st.builds(BatchShape, st.integers(1, 4), st.integers(1, 60))
PLANS = st.sampled_from(
    [NATIVE, Plan.removing(0), Plan.removing(0, 1, 2, 3), Plan.uniform(2, weights="int4"),
     Plan.uniform(2, caches="int4")]
)  # fmt: skip
MEASURED = {
    "budget_bytes": SIZES, "used_bytes": SIZES, "held_bytes": SIZES, "kept_bytes": SIZES,
    "margin_bytes": st.integers(0, 20_000),
}  # fmt: skip
SNAPSHOTS = st.builds(
    Snapshot,
    plan=PLANS,
    running=st.one_of(st.just(EMPTY_BATCH), SHAPES),
    joined=st.one_of(st.none(), SHAPES),
    newest=st.just("row"),
    request=st.just("request"),
    rows_plan=PLANS,
    refills=st.booleans(),
    stalled=st.booleans(),
    reserve_bytes=st.integers(0, 50_000),
    borrowed_bytes=st.sampled_from([0, 10_000]),
    spare_bytes=st.integers(0, 10_000),
    floor=st.sampled_from([0.0, 1.0, 1e9]),
    rejected_bytes=st.one_of(st.none(), SIZES),
    lasting_bytes=st.one_of(st.none(), SIZES),
    rests=st.booleans(),
    readable=st.booleans(),
    **MEASURED,
)


def after(draw, snapshot, actions):
    """The next snapshot: what was done may have failed, and anything may be measured."""
    for action in actions:
        failed = draw.draw(st.booleans(), label=f"{action} fails")
        if isinstance(action, FreeKept) and action.at_once:
            failed = False
        change = {}
        if isinstance(action, Apply) and not failed:
            change = {"plan": action.plan}
        elif isinstance(action, Borrow):
            change = {"borrowed_bytes": action.bytes}
        elif isinstance(action, FreeKept):
            kept = snapshot.kept_bytes // 2 if failed else 0
            change = {"kept_bytes": kept}
        progress = snapshot.progress.after(action, failed=failed)
        snapshot = replace(snapshot, progress=progress, **change)
    measured = {name: draw.draw(sizes, label=name) for name, sizes in MEASURED.items()}
    measured["kept_bytes"] = min(measured["kept_bytes"], snapshot.kept_bytes)  # nothing is added
    return replace(snapshot, **measured)


@settings(max_examples=300)
@given(snapshot=SNAPSHOTS, draw=st.data())
def test_deciding_acting_and_measuring_end_whatever_is_measured(predicting, snapshot, draw):
    for _ in range(100):
        actions = decide(snapshot, predicting)
        assert decide(snapshot, predicting) == actions  # it is pure
        if not actions or not isinstance(actions[-1], Action):
            break
        snapshot = after(draw, snapshot, actions)
    else:
        raise AssertionError(f"{actions} follow one another without end")
    if snapshot.joined is not None:
        assert isinstance(actions[-1], Admit | Wait | EndRefill)
