"""A server whose policy chooses by the kind of text: of chats, completions and several prompts."""

from __future__ import annotations

from functools import partial

import pytest

from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.policies.by_text import TextPolicy
from rap_env.policies.knapsack import KnapsackPolicy
from rap_env.runtime.batch_shape import BatchShape
from rap_env.runtime.memory_meter import TensorMeter
from rap_env.runtime.memory_source import GivenMemory
from rap_env.serving.server import BackgroundServer
from rap_env.serving.settings import ServerSettings
from rap_env.serving.stack import build_stack
from tests.importance.test_kind_costs import kind_costs
from tests.serving.test_app import post
from tests.tiny import tiny_llm

PROSE, CODE = "backgammonplayedit", "QRSTUVWYZYXWSTRQVU"
"""Letters of the lower and of the upper half of the vocabulary, in prompts of the same length."""


@pytest.fixture(scope="module")
def stack(tokenizer):
    llm = tiny_llm(layers=3, tokenizer=tokenizer)
    llm.set_residency("offload")
    memory = MemoryModel(llm)
    settings = ServerSettings(model_name="tiny", shutdown_grace_s=5.0, max_delta_nll=None)
    budget = []
    stack = build_stack(
        settings,
        llm=llm,
        policy=TextPolicy(kind_costs(memory.facts), partial(KnapsackPolicy, memory)),
        memory=GivenMemory(lambda: budget[0] if budget else 10**9),
        meter=TensorMeter(llm),
        hold_s=0.0,
    )
    native = stack.engine.controller.estimator.peak_bytes(Plan(), BatchShape(1, 40))
    budget.append(int(0.7 * native))
    return stack


@pytest.fixture(scope="module")
def server(stack):
    with BackgroundServer(stack.app) as running:
        yield running


def shares_of(stack, **body):
    """What kinds of text the server sees in a request."""
    from rap_env.serving.schemas import ChatCompletionRequest, CompletionRequest

    kind = ChatCompletionRequest if "messages" in body else CompletionRequest
    return stack.app.state.service.builder.build(
        kind(model="tiny", max_tokens=4, **body)
    ).text_shares


def test_a_chat_counts_without_its_template_and_system_message(stack):
    for text, number in ((PROSE, 0), (CODE, 1)):
        (plain,) = shares_of(stack, prompt=text)
        assert plain[number] > 0.8
        asked = {"role": "user", "content": text}
        ordered = {"role": "system", "content": CODE[:9] if number == 0 else "advise"}
        for messages in ([asked], [ordered, asked]):
            (found,) = shares_of(stack, messages=messages)
            assert found[number] > 0.8
    both = shares_of(stack, prompt=[PROSE, CODE])
    assert both == [*shares_of(stack, prompt=PROSE), *shares_of(stack, prompt=CODE)]


def test_answers_come_from_the_plan_of_their_text_and_say_so(stack, server):
    policy, plans, steps = stack.engine.controller.chooser.policy, {}, []
    stack.engine.observers.append(steps.append)
    for text in (PROSE, CODE, PROSE):
        body = {"model": "tiny", "prompt": text, "max_tokens": 4, "temperature": 0}
        answer = post(server, body, "completions").json()["rap"]
        plan, tokens = steps[-1].plan, len(text) + 3
        assert answer["plan"] == plan.digest
        assert plans.setdefault(text, plan) == plan
        own, general = (policy.for_text(one) for one in (*shares_of(stack, prompt=text), ()))
        assert answer["delta_nll"] == pytest.approx(own.delta_nll(plan, tokens))
        assert answer["delta_nll"] != pytest.approx(general.delta_nll(plan, tokens))
    assert plans[PROSE] != plans[CODE], "equal lengths in an equal budget"
