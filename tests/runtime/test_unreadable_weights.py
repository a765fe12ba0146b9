"""While a file of weights cannot be read, the plan stays, and is raised once the file is back."""

import itertools
import logging

import pytest

from rap_env.paths import cache_dir
from rap_env.plan import Plan
from rap_env.runtime.memory_estimator import BatchShape
from tests.models.states import damage_file
from tests.runtime.harness import ORDER, FakePolicy, Harness, alone, greedy, ordered, prompt

SHAPE = BatchShape(1, 20)
OUT = Plan.removing(0, 5)  # removed at the small budget


class Outage:
    """A server that has removed two blocks, and the file of one of them."""

    def __init__(self, how, **settings):
        self.harness = ordered(hold_s=0.0, spare_share=0.0, **settings)
        large = self.harness.budget_bytes
        self.harness.budget_bytes = self.harness.need(OUT, SHAPE)
        self.engine = self.harness.engine()
        self.engine.submit(prompt(4), greedy(16))
        self.engine.step()
        assert self.harness.mask == OUT
        self.file = next(cache_dir().rglob("block000.safetensors"))
        self.content = self.file.read_bytes()
        damage_file(self.file, how)
        self.harness.budget_bytes = large
        self.harness.run(self.engine)

    @property
    def reason(self):
        return self.harness.controller.switcher.unreadable

    def ask(self):
        """Answer a request."""
        handle = self.engine.submit(prompt(4), greedy(4))
        self.harness.run(self.engine)
        return handle

    def idle(self, seconds):
        for _ in range(2 * seconds):
            self.engine.step()
            self.harness.time_s += 0.5


@pytest.mark.parametrize("how", ["gone", "cut", "changed"])
def test_requests_go_on_with_the_plan_until_the_file_is_back(how, caplog):
    caplog.set_level(logging.INFO, logger="rap_env.runtime")
    outage = Outage(how)
    lowered = alone(outage.harness.llm, prompt(4), 4, OUT)
    while outage.harness.time_s < 60:
        handle = outage.ask()
        assert (handle.reason, handle.token_ids) == ("length", lowered)
        outage.idle(15)
    assert outage.harness.mask == OUT
    assert str(outage.file) in outage.reason
    (line,) = (text for text in caplog.messages if "Plan changed" not in text)
    assert line.startswith("The plan stays, and a try follows every 5 s: ")
    outage.file.write_bytes(outage.content)
    outage.idle(6)
    assert not outage.harness.llm.plan
    assert outage.ask().token_ids == alone(outage.harness.llm, prompt(4), 4)
    assert outage.reason == ""
    texts = [text for text in caplog.messages if "Plan changed" not in text]
    assert texts == [line, "The weights of the plan can be read again."]


def test_an_engine_is_not_ready_while_its_plan_cannot_be_raised():
    outage = Outage("gone")
    outage.ask()
    outage.engine.start()
    try:
        reason = outage.engine.unready_reason()
        assert reason.startswith("The plan cannot be raised: ")
        assert str(outage.file) in reason
    finally:
        outage.engine.close()


def test_a_file_is_looked_at_every_five_seconds_whatever_the_budget_is():
    outage = Outage("gone")
    outage.ask()
    outage.harness.budget_bytes = outage.harness.need(OUT, SHAPE)
    tried, prepare = [], outage.harness.llm.prepare

    def noted(plan):
        tried.append(outage.harness.time_s)
        prepare(plan)

    outage.harness.llm.prepare = noted
    outage.idle(21)
    waits = [later - sooner for sooner, later in itertools.pairwise(tried)]
    assert len(tried) == 4
    assert waits == pytest.approx([5, 5, 5], abs=0.6)
    assert outage.reason
    outage.file.write_bytes(outage.content)
    outage.idle(6)
    assert not outage.reason


def test_below_the_quality_floor_requests_wait_until_the_file_is_back():
    outage = Outage("gone")
    chooser = outage.harness.controller.chooser
    chooser.policy.delta_nll = lambda plan, tokens: float(len(plan.removed))  # of each block
    chooser.use_policy(chooser.policy, 0.5)
    handle = outage.engine.submit(prompt(4), greedy(4))
    outage.idle(12)
    assert (handle.token_ids, outage.harness.mask) == ([], OUT)
    outage.file.write_bytes(outage.content)
    outage.idle(6)
    assert handle.reason == "length"


def test_a_budget_that_falls_removes_more_where_the_policy_needs_what_cannot_be_read():
    policy = FakePolicy(Plan.removing(1, 2, 3))
    harness = Harness(policy=policy, guard_order=ORDER, mask=Plan.removing(0))
    next(cache_dir().rglob("block000.safetensors")).unlink()
    harness.budget_bytes = harness.need(policy.mask, SHAPE)
    assert harness.check(SHAPE)
    assert harness.mask.removed > {0}
    assert harness.mask.removed <= {0, *ORDER}
    assert harness.need(harness.mask, SHAPE) <= harness.budget_bytes
    assert harness.controller.switcher.unreadable
