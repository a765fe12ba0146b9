"""Every answer says which plan computed it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from rap_env.plan import Plan
from rap_env.serving.generation import AnswerPlans
from tests.serving.conftest import client_of, served
from tests.serving.fake_engine import NATIVE, PLAN, FakeEngine, delta_nll
from tests.serving.test_app import CHAT, PLAIN, events_of, post

UNKNOWN = Plan(embeddings="int8")
LEVELS = "removed attn 0-1; removed ffn 1; int8 ffn 2; int4 cache 2-3"
PROMPT = len("user: hi\nassistant: ")


def plans_of(*plans):
    found = AnswerPlans(lambda plan: delta_nll(plan, 100), "server")
    for plan in plans:
        found.add(plan)
    return found


@pytest.fixture(scope="module")
def lowered(tokenizer):
    """A server that lowers its plan at the third token."""
    with served(FakeEngine(tokenizer, "hello", plans=(NATIVE, NATIVE, PLAN)), tokenizer) as found:
        yield found


def test_the_plan_with_the_largest_rise_is_reported():
    rise = delta_nll(PLAN, 100)
    for plans in ((PLAN,), (NATIVE, PLAN), (PLAN, NATIVE)):
        assert plans_of(*plans).report() == {
            "plan": PLAN.digest, "levels": LEVELS, "delta_nll": rise,
            "plan_changed": len(plans) > 1,
        }  # fmt: skip
    unknown = plans_of(PLAN, UNKNOWN, NATIVE)
    assert unknown.report()["plan"] == UNKNOWN.digest
    assert unknown.report()["delta_nll"] is None
    assert "x-rap-delta-nll" not in unknown.headers()
    assert not plans_of(PLAN, PLAN).changed


def test_the_fingerprint_is_that_of_the_plans_in_their_order():
    runs = [(NATIVE,), (PLAN,), (NATIVE, PLAN), (PLAN, NATIVE), (NATIVE, PLAN, NATIVE)]
    assert len({plans_of(*plans).fingerprint for plans in runs}) == len(runs)
    assert plans_of(NATIVE, NATIVE, PLAN).fingerprint == plans_of(NATIVE, PLAN).fingerprint
    other = AnswerPlans(lambda plan: None, "another server")
    other.add(NATIVE)
    assert other.fingerprint != plans_of(NATIVE).fingerprint


@pytest.mark.parametrize(("body", "route"), [(CHAT, "chat/completions"), (PLAIN, "completions")])
def test_an_answer_and_its_headers_have_the_plan(lowered, body, route):
    response = post(lowered, {**body, "max_tokens": 8}, route)
    found = response.json()["rap"]
    tokens = (PROMPT if body is CHAT else len("hi")) + 7
    assert found == {
        "plan": PLAN.digest, "levels": LEVELS, "delta_nll": delta_nll(PLAN, tokens),
        "plan_changed": True,
    }  # fmt: skip
    headers = response.headers
    assert headers["x-rap-plan"] == PLAN.digest
    assert headers["x-rap-levels"] == LEVELS
    assert float(headers["x-rap-delta-nll"]) == found["delta_nll"]
    assert headers["x-rap-plan-changed"] == "true"
    first = post(lowered, {**body, "max_tokens": 2}, route)
    assert first.json()["rap"] == {
        "plan": NATIVE.digest, "levels": "native", "delta_nll": 0.0, "plan_changed": False,
    }  # fmt: skip
    assert first.json()["system_fingerprint"] != response.json()["system_fingerprint"]


@pytest.mark.parametrize("usage", [False, True])
@pytest.mark.parametrize(("body", "route"), [(CHAT, "chat/completions"), (PLAIN, "completions")])
def test_the_last_chunk_of_a_stream_has_the_plan(lowered, body, route, usage):
    options = {"stream": True, "stream_options": {"include_usage": usage}, "n": 2}
    response = post(lowered, {**body, **options}, route)
    *events, last = events_of(response)
    assert not any("rap" in event for event in events)
    assert (last["rap"]["plan"], last["rap"]["plan_changed"]) == (PLAN.digest, True)
    assert bool(last["choices"]) != usage
    assert response.headers["x-rap-plan"] == NATIVE.digest
    assert response.headers["x-rap-levels"] == "native"
    assert "x-rap-plan-changed" not in response.headers
    whole = post(lowered, body, route).json()
    alone = events_of(post(lowered, {**body, "stream": True}, route))
    assert alone[-1]["system_fingerprint"] == whole["system_fingerprint"]
    assert alone[0]["system_fingerprint"] != whole["system_fingerprint"]
    kind = ChatCompletionChunk if body is CHAT else Completion
    kind.model_validate(last)


def test_the_client_parses_answers_and_gives_the_plan(lowered):
    with client_of(lowered) as client:
        raw = client.chat.completions.with_raw_response.create(**CHAT)
        answer = raw.parse()
        assert answer.model_extra["rap"]["levels"] == LEVELS
        assert raw.headers["x-rap-plan"] == answer.model_extra["rap"]["plan"]
        ChatCompletion.model_validate(answer.model_dump())
        chunks = list(client.completions.create(**PLAIN, stream=True))
        assert chunks[-1].model_extra["rap"]["plan"] == PLAN.digest


def test_the_example_of_the_docs_has_the_fields_of_an_answer(lowered):
    page = (Path(__file__).parents[2] / "docs" / "runtime.md").read_text(encoding="utf-8")
    blocks = map(json.loads, re.findall(r"^```json\n(.*?)^```$", page, re.MULTILINE | re.DOTALL))
    (example,) = [block for block in blocks if "rap" in block]
    answer = post(lowered, CHAT).json()
    assert example.keys() <= answer.keys()
    assert {k: type(v) for k, v in example["rap"].items()} == {
        k: type(v) for k, v in answer["rap"].items()
    }
