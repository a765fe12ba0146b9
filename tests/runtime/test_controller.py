"""When the controller removes blocks, and when it restores them."""

import random
import re

import pytest

from rap_env.errors import MemorySourceError
from rap_env.plan import Plan
from rap_env.runtime.memory_estimator import EMPTY_BATCH
from tests.runtime.harness import ORDER, PLENTY, SHAPE, FakePolicy, Harness, between, ordered


@pytest.fixture
def harness():
    return ordered()


@pytest.fixture
def triggers(caplog):
    """What caused each change of the plan so far, as the log says."""
    caplog.set_level("INFO", "rap_env.runtime.controller")
    return lambda: re.findall(r"Plan changed \((\w+)\)", caplog.text)


@pytest.mark.parametrize(("said", "more"), [((4,), (5, 0)), ((1, 2, 3), ())])
def test_the_policys_own_mask_is_taken_and_the_guard_shrinks_it_if_it_does_not_fit(said, more):
    harness = Harness(policy=FakePolicy(Plan.removing(*said)), guard_order=ORDER)
    expected = Plan.removing(*said, *more)
    harness.budget_bytes = harness.need(expected, SHAPE)
    assert harness.admit(SHAPE)
    assert harness.mask == expected
    assert harness.policy.asked[0].budget_bytes == harness.budget_bytes


@pytest.mark.parametrize("said", [RuntimeError("no"), Plan.removing(99), None])
def test_a_policy_that_fails_is_replaced_by_the_guard(said, caplog):
    harness = Harness(policy=FakePolicy(said), guard_order=ORDER)
    harness.budget_bytes = between(harness, 3)
    assert harness.admit(SHAPE)
    assert harness.mask == Plan.removing(*ORDER[:3])
    assert "'fake' failed" in caplog.text


def test_unpredicted_bytes_are_learned_and_reserved(harness):
    harness.budget_bytes = between(harness, 2)
    harness.admit(SHAPE)
    harness.meter.noise_bytes = 3 * 10**5
    harness.controller.monitor.observe_step(SHAPE, "prefill")
    learned = harness.controller.monitor.margin.bytes
    assert learned == pytest.approx(3 * 10**5 - harness.estimator.workspace_bytes(SHAPE), abs=10)
    harness.budget_bytes += learned
    assert harness.check(SHAPE)
    assert len(harness.mask.removed) == 2


def test_while_idle_a_burst_expires_and_freed_memory_is_returned(harness):
    harness.meter.noise_bytes = 10**6
    harness.controller.monitor.observe_step(SHAPE, "decode")
    assert harness.controller.monitor.margin.bytes > 0
    harness.meter.noise_bytes = 0
    for _ in range(500):
        harness.time_s += 0.1
        harness.check(EMPTY_BATCH)
    assert harness.controller.monitor.margin.bytes == 0


def test_a_source_that_fails_leaves_the_budget_as_it_was(harness, caplog):
    harness.check(SHAPE)

    def fails(used_bytes):
        raise MemorySourceError("gone")

    harness.controller.monitor.source.budget_bytes = fails
    assert harness.check(SHAPE)
    assert harness.controller.monitor.budget_bytes == harness.budget_bytes
    assert "stays at" in caplog.text


def test_a_change_of_the_plan_is_logged_in_a_short_line(caplog):
    caches = {f"layer{n:02}.cache": f"int{4 + 4 * (n % 2)}" for n in range(64)}
    plan = Plan.of(caches | {f"layer{n:02}.ffn": "removed" for n in range(0, 64, 2)})
    harness = Harness(policy=FakePolicy(plan), layers=64)
    harness.budget_bytes = harness.need(plan, SHAPE)
    caplog.set_level("INFO", "rap_env.runtime.controller")
    assert harness.check(SHAPE)
    assert harness.llm.plan == plan
    (line,) = [record.getMessage() for record in caplog.records]
    assert len(line) <= 400
    assert line.startswith("Plan changed (budget_fell): removed ffn 0 2 4 ")
    assert f"budget {harness.budget_bytes / 2**20:.1f} MiB" in line


@pytest.mark.parametrize(
    ("moments", "kept"),
    [
        ([(0, 3), (0, 0), (1, 0), (1.9, 0)], 3),  # headroom must last for two seconds
        ([(0, 3), (0, 0), (1, 0), (1.9, 0), (2, 0)], 0),
        ([(0, 3), (0.1, 0), (1, 3), (1.1, 0), (2.5, 0)], 3),  # a dip restarts the wait
        ([(0, 3), (0.1, 0), (1, 3), (1.1, 0), (2.5, 0), (3.2, 0)], 0),
        ([(0, 5), (1, 0), (2, 2), (3, 0)], 2),  # only what fitted throughout is restored
        ([(0, 5), (1, 0), (2, 2), (3, 0), (5, 0)], 2),  # and then a new wait begins
        ([(0, 5), (1, 0), (2, 2), (3, 0), (4, 0), (6, 0)], 0),
    ],
)
def test_blocks_are_restored_once_headroom_has_lasted(moments, kept, triggers):
    """Moments: seconds, and how many blocks must be removed for the budget of the moment."""
    harness = ordered(hold_s=2.0, spare_share=0.0)
    for time_s, removed in moments:
        harness.time_s = float(time_s)
        harness.budget_bytes = between(harness, removed) if removed else PLENTY
        assert harness.check(SHAPE)
    assert harness.mask == Plan.removing(*ORDER[:kept])
    if kept == 0:
        assert triggers()[-1] == "room"


def switches(*, share, hold_s) -> int:
    harness = ordered(spare_share=share, hold_s=hold_s)
    threshold = harness.need(Plan.removing(*ORDER[:2]), SHAPE)
    for step in range(600):
        harness.time_s = step / 10
        jitter = 0.03 * random.Random(harness.time_s).uniform(-1, 1)
        harness.budget_bytes = int(threshold * (1 + jitter))
        assert harness.check(SHAPE)
    return harness.controller.switcher.switches


def test_a_budget_that_moves_around_a_threshold_does_not_make_the_mask_flap():
    assert switches(share=0.05, hold_s=2.0) <= 2
    assert switches(share=0.0, hold_s=0.0) > 30


def test_a_policy_that_adds_no_block_is_not_asked_repeatedly():
    mask = Plan.removing(0, 2)
    harness = Harness(policy=FakePolicy(mask), guard_order=ORDER, mask=mask, hold_s=1.0)
    for step in range(200):
        harness.time_s = step / 10
        assert harness.check(SHAPE)
    assert harness.mask == mask
    assert len(harness.policy.asked) == 1
