"""A server whose weights file goes away, is cut or changes continues, and recovers by itself."""

import itertools
import logging

import pytest

from rap_env.errors import InfeasibleBudgetError, UnknownNameError
from rap_env.models.live.elastic import ElasticLLM
from rap_env.paths import cache_dir
from rap_env.plan import Plan
from rap_env.runtime.batch_shape import BatchShape
from tests.models.states import damage_file
from tests.runtime.harness import Harness, alone, greedy, ordered, prompt

SHAPE = BatchShape(1, 20)
OUT = Plan.removing(0, 5)  # removed at the small budget


class Outage:
    """A server that has removed two blocks, and the files of one of them."""

    def __init__(self, how, **settings):
        self.harness = ordered(hold_s=0.0, hysteresis_share=0.0, **settings)
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
    def unreadable(self):
        return self.harness.controller.chooser.unreadable

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
def test_requests_go_on_without_the_block_until_its_file_is_back(how, caplog):
    caplog.set_level(logging.INFO, logger="rap_env.runtime")
    outage = Outage(how)
    degraded = alone(outage.harness.llm, prompt(4), 4, Plan.removing(0))
    while outage.harness.time_s < 60:
        handle = outage.ask()
        assert (handle.reason, handle.token_ids) == ("length", degraded)
        outage.idle(15)
    assert outage.harness.mask == Plan.removing(0)  # the other one is back
    assert outage.unreadable.items == ("layer00.attn",)
    assert str(outage.file) in outage.unreadable.reason
    (line,) = (text for text in caplog.messages if "Plan changed" not in text)
    assert line.startswith("The weights of 1 items cannot be read")
    outage.file.write_bytes(outage.content)
    outage.idle(6)
    assert not outage.harness.llm.plan
    assert outage.ask().token_ids == alone(outage.harness.llm, prompt(4), 4)
    assert (outage.unreadable.items, outage.unreadable.reason) == ((), "")
    texts = [text for text in caplog.messages if "Plan changed" not in text]
    assert texts == [line, "All weights can be read again."]


def test_an_engine_says_that_weights_are_missing():
    outage = Outage("gone")
    outage.ask()
    outage.engine.start()
    try:
        reason = outage.engine.unready_reason()
        assert reason.startswith("The weights of 1 items are missing: ")
        assert str(outage.file) in reason
    finally:
        outage.engine.close()


def test_a_file_is_tried_every_five_seconds(monkeypatch):
    outage = Outage("gone")
    outage.ask()
    tried = []

    def verify(llm, item):
        tried.append(outage.harness.time_s)
        raise UnknownNameError("item", item, [])

    monkeypatch.setattr(ElasticLLM, "verify_weights", verify)
    outage.idle(21)
    waits = [later - sooner for sooner, later in itertools.pairwise(tried)]
    assert len(tried) == 4
    assert waits == pytest.approx([5, 5, 5], abs=0.6)


def test_below_the_quality_floor_requests_are_refused_until_the_file_is_back():
    outage = Outage("gone", policy=None)
    chooser = outage.harness.controller.chooser
    chooser.max_delta_nll = chooser.most_delta_nll = 0.5
    chooser.policy.delta_nll = lambda plan, tokens: float(len(plan.removed))  # of each block
    with pytest.raises(InfeasibleBudgetError, match="without 1 items that cannot be read"):
        outage.ask()
    outage.file.write_bytes(outage.content)
    outage.idle(6)
    assert outage.ask().reason == "length"


def test_a_block_at_another_level_keeps_it():
    harness = Harness()
    unreadable = harness.controller.chooser.unreadable
    low = Plan.of({"layer00.ffn": "int4", "layer01.ffn": "removed"})
    harness.llm.apply(low)
    for name in ("block001", "block003"):
        next(cache_dir().rglob(f"{name}.safetensors")).unlink()
    errors = harness.llm.apply_readable(Plan())
    assert errors.keys() == {"layer00.ffn", "layer01.ffn"}
    assert harness.llm.plan == low
    unreadable.add(errors)
    assert unreadable.without(Plan()) == low
    assert (
        unreadable.without(Plan.uniform(3, weights="removed")).removed == harness.everything.removed
    )
