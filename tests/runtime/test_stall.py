"""A request that waits while nothing runs: the reserve, the margin, the floor, and what is said."""

import pytest

from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.policies.loading import StaticPolicy
from rap_env.runtime.controller import RuntimeController
from rap_env.runtime.engine import Engine
from rap_env.runtime.memory_estimator import BatchShape, PassSize
from rap_env.runtime.memory_limit import SystemMemory
from rap_env.runtime.memory_monitor import HEADROOM_BYTES
from rap_env.runtime.records import ControllerSettings, EngineSettings
from tests.runtime.harness import PLENTY, Harness, NoisyMeter, greedy, prompt
from tests.runtime.schedules import knapsack
from tests.tiny import tiny_llm

NATIVE = Plan()
RESERVE_BYTES = HEADROOM_BYTES + 40_000


class System(SystemMemory):
    """A system with `room_bytes` for the model beside the reserve."""

    name = "system"
    reserve_bytes = RESERVE_BYTES
    room_bytes = PLENTY

    def budget_bytes(self, used_bytes):
        return max(0, self.room_bytes)

    def free_bytes(self):
        raise NotImplementedError

    def total_bytes(self):
        return PLENTY


class Stand:
    """An engine whose only plan is the native one, unless told, in a system with a reserve."""

    def __init__(self, policy=None, **settings):
        self.time_s, self.system = 0.0, System()
        llm = tiny_llm(layers=2)
        self.controller = RuntimeController(
            llm,
            policy or StaticPolicy(NATIVE),
            self.system,
            ControllerSettings(guard_order=(), hold_s=0.0),
            meter=NoisyMeter(llm),
            clock=lambda: self.time_s,
        )
        self.engine = Engine(self.controller, EngineSettings(**settings))

    def need(self, *rows):
        return self.controller.estimator.peak_bytes(NATIVE, BatchShape.of(rows))

    def run_for(self, seconds):
        end_s = self.time_s + seconds
        while self.time_s < end_s:
            self.engine.step()
            self.time_s += 0.1

    @property
    def borrowed_bytes(self):
        return self.controller.monitor.borrowed_bytes


def test_a_request_that_nothing_runs_beside_gets_a_part_of_the_reserve_and_gives_it_back():
    stand = Stand()
    handle = stand.engine.submit(prompt(10), greedy(40))
    usable = RESERVE_BYTES - HEADROOM_BYTES
    stand.system.room_bytes = stand.need((10, 40)) - usable // 3  # two quarters are needed
    stand.run_for(0.2)
    assert not handle.token_ids
    stand.run_for(1.8)
    assert handle.token_ids  # within two seconds
    assert stand.borrowed_bytes == usable // 2
    stand.system.room_bytes = PLENTY
    stand.run_for(0.2)
    assert (stand.borrowed_bytes, handle.preemptions) == (0, 0)
    stand.run_for(5)
    assert handle.reason == "length"


def test_the_last_request_continues_in_the_reserve_and_no_other_joins_it_there():
    stand = Stand()
    handles = [stand.engine.submit(prompt(10, n), greedy(30)) for n in range(2)]
    stand.run_for(1)
    stand.system.room_bytes = stand.need((10, 30)) - 1000
    stand.run_for(1)
    assert [handle.preemptions for handle in handles] == [0, 1]
    assert stand.borrowed_bytes > 0
    stand.run_for(1.5)
    assert handles[0].reason == "length"
    assert not handles[1].done
    assert stand.engine.stats().running <= 1
    stand.run_for(6)
    assert handles[1].reason == "length"  # it was stalled, then, and had the reserve too
    assert stand.borrowed_bytes == 0


def test_a_stall_that_no_plan_ends_says_why_once(caplog):
    harness = Harness(guard_order=())
    engine = harness.engine()
    admission = engine._scheduler.admission
    handle = engine.submit(prompt(10), greedy(20))
    engine.submit(prompt(12), greedy(20))
    need = harness.need(NATIVE, BatchShape(1, 29))
    harness.budget_bytes = need - 1000
    for turn in range(50):
        engine.step()
        harness.time_s += 0.1
        assert turn > 8 or not admission.stall_reason  # a short stall is no warning
    (line,) = [record.message for record in caplog.records if "cannot run now" in record.message]
    assert admission.stall_reason == line
    assert engine.stats().stalled_s == pytest.approx(5, abs=0.2)
    assert engine.retry_after_s() == 5
    harness.time_s += 1
    harness.budget_bytes = PLENTY
    engine.step()
    assert admission.stall_reason == ""
    assert engine.stats().stalled_s == 0
    harness.run(engine)
    assert handle.reason == "length"


# A floor that follows the queue


def following(**settings):
    policy = knapsack()
    harness = Harness(
        layers=2, policy=policy, max_delta_nll=0.1, most_delta_nll=0.35, hold_s=0.0, **settings
    )
    return harness, harness.controller.chooser


def test_the_floor_rises_with_waiting_requests_to_its_most_and_falls_with_the_queue():
    harness, chooser = following()
    floors = []
    for waiting in (0, 1, 2, 3, 9, 0):
        harness.check(BatchShape(1, 10), PassSize(1, 1), waiting=waiting)
        floors.append(round(chooser.max_delta_nll, 3))
    assert floors == [0.1, 0.2, 0.3, 0.35, 0.35, 0.1]
    chooser.follow_queue(0, NATIVE, BatchShape(), stalled=True)
    assert chooser.max_delta_nll == 0.35
    fixed = Harness(layers=2, policy=knapsack(), max_delta_nll=0.1)
    fixed.check(BatchShape(1, 10), PassSize(1, 1), waiting=9)
    assert fixed.controller.chooser.max_delta_nll == 0.1


def test_a_floor_that_falls_preempts_nothing_and_more_is_served_than_with_a_fixed_one():
    served = {}
    for most in (None, 3.0):
        policy = knapsack()
        harness = Harness(
            layers=2, policy=policy, max_delta_nll=0.1, most_delta_nll=most, hold_s=0.2
        )
        memory, shape = MemoryModel(harness.llm), BatchShape(4, 30)
        harness.budget_bytes = int(memory.native_peak_bytes(2, 30))
        engine = harness.engine(max_batch_size=8)
        handles = [engine.submit(prompt(10, n), greedy(20)) for n in range(10)]
        harness.run(engine)
        assert all(handle.reason == "length" for handle in handles)
        rises = [policy.delta_nll(plan, shape.longest_tokens) for h in handles for plan in h.plans]
        assert max(rises) <= (most or 0.1)
        served[most] = (harness.time_s, sum(handle.preemptions for handle in handles))
        assert harness.controller.chooser.max_delta_nll == pytest.approx(0.1)
    assert served[3.0][0] < 0.8 * served[None][0]
    assert served[3.0][1] == 0
