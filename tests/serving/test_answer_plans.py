"""Every answer says which plan computed it, and metrics count answers and plans."""

import json
import re
from pathlib import Path

import httpx
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletionChunk
from prometheus_client.parser import text_string_to_metric_families

from rap_env.plan import Plan
from rap_env.runtime.request_handle import AdmitEvent, EndEvent, PlanEvent, TokenEvent
from rap_env.serving.generation import AnswerPlans, AnswerTimer
from rap_env.serving.metrics import ServingMetrics
from rap_env.serving.settings import ServerSettings
from tests.serving.conftest import served
from tests.serving.fake_engine import NATIVE, PLAN, FakeEngine, delta_nll
from tests.serving.test_app import CHAT, PLAIN, events_of, post

UNKNOWN = Plan(embeddings="int8")
LEVELS = "removed attn 0-1; removed ffn 1; int8 ffn 2; int4 cache 2-3"
PROMPT = len("user: hi\nassistant: ")
ROUTES = pytest.mark.parametrize(
    ("body", "route"), [(CHAT, "chat/completions"), (PLAIN, "completions")]
)


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
            "plan_changed": len(plans) > 1, "kept_tokens": 0, "kept_levels": {},
            "kept_file_tokens": 0,
        }  # fmt: skip
    kept = AnswerPlans(lambda plan: delta_nll(plan, 100), "server")
    kept.add_kept({PLAN})
    kept.add(NATIVE)
    report = kept.report()
    assert (report["plan"], report["delta_nll"], kept.changed) == (PLAN.digest, rise, False)
    assert kept.fingerprint == plans_of(NATIVE).fingerprint  # they are no passes
    unknown = plans_of(PLAN, UNKNOWN, NATIVE)
    assert unknown.report()["plan"] == UNKNOWN.digest
    assert unknown.report()["delta_nll"] is None
    assert not plans_of(PLAN, PLAN).changed


def test_the_fingerprint_is_that_of_the_plans_in_their_order():
    runs = [(NATIVE,), (PLAN,), (NATIVE, PLAN), (PLAN, NATIVE), (NATIVE, PLAN, NATIVE)]
    assert len({plans_of(*plans).fingerprint for plans in runs}) == len(runs)
    assert plans_of(NATIVE, NATIVE, PLAN).fingerprint == plans_of(NATIVE, PLAN).fingerprint
    other = AnswerPlans(lambda plan: None, "another server")
    other.add(NATIVE)
    assert other.fingerprint != plans_of(NATIVE).fingerprint


@ROUTES
def test_an_answer_has_the_plan(lowered, body, route):
    response = post(lowered, {**body, "max_tokens": 8}, route)
    found = response.json()["rap"]
    tokens = (PROMPT if body is CHAT else len("hi")) + 7
    assert found == {
        "plan": PLAN.digest, "levels": LEVELS, "delta_nll": delta_nll(PLAN, tokens),
        "plan_changed": True, "kept_tokens": 0, "kept_levels": {},
        "kept_file_tokens": 0, "ignored": [],
    }  # fmt: skip
    first = post(lowered, {**body, "max_tokens": 2}, route)
    assert first.json()["rap"] == {
        "plan": NATIVE.digest, "levels": "native", "delta_nll": 0.0, "plan_changed": False,
        "kept_tokens": 0, "kept_levels": {},
        "kept_file_tokens": 0, "ignored": [],
    }  # fmt: skip
    assert first.json()["system_fingerprint"] != response.json()["system_fingerprint"]


@pytest.mark.parametrize("usage", [False, True])
@ROUTES
def test_the_last_chunk_of_a_stream_has_the_plan(lowered, body, route, usage):
    options = {"stream": True, "stream_options": {"include_usage": usage}, "n": 2}
    response = post(lowered, {**body, **options}, route)
    *events, last = events_of(response)
    assert not any("rap" in event for event in events)
    assert (last["rap"]["plan"], last["rap"]["plan_changed"]) == (PLAN.digest, True)
    assert bool(last["choices"]) != usage
    whole = post(lowered, body, route).json()
    alone = events_of(post(lowered, {**body, "stream": True}, route))
    assert alone[-1]["system_fingerprint"] == whole["system_fingerprint"]
    assert alone[0]["system_fingerprint"] != whole["system_fingerprint"]
    kind = ChatCompletionChunk if body is CHAT else Completion
    kind.model_validate(last)


def test_the_example_of_the_docs_has_the_fields_of_an_answer(lowered):
    page = (Path(__file__).parents[2] / "docs" / "server_reference.md").read_text(encoding="utf-8")
    blocks = map(json.loads, re.findall(r"^```json\n(.*?)^```$", page, re.MULTILINE | re.DOTALL))
    (example,) = [block for block in blocks if "rap" in block]
    answer = post(lowered, CHAT).json()
    assert example.keys() <= answer.keys()
    assert {k: type(v) for k, v in example["rap"].items()} == {
        k: type(v) for k, v in answer["rap"].items()
    }


def token(time_s):
    return TokenEvent(5, -0.5, time_s, NATIVE)


def test_an_answer_is_measured_from_its_events(tokenizer):
    metrics = ServingMetrics(FakeEngine(tokenizer), ServerSettings())
    timer = AnswerTimer(metrics, 7, arrived_s=100.0)
    events = [
        AdmitEvent(103.0), PlanEvent(NATIVE, 103.5), token(104.0), token(104.5),
        AdmitEvent(106.0),  # after a preemption
        token(107.0), EndEvent("length", None, 107.0),
    ]  # fmt: skip
    for event in events:
        timer.add(event)
    assert (timer.queue_s, timer.first_token_s) == (3.0, 4.0)
    text = metrics.render().decode()
    assert {name: float(value) for name, value in re.findall(r"rap_(\w+)_sum (\S+)\n", text)} == {
        "queue_time_seconds": 3.0,
        "time_to_first_token_seconds": 4.0,
        "inter_token_latency_seconds": 3.0,
        "answer_duration_seconds": 7.0,
        "prompt_length_tokens": 7,
        "answer_length_tokens": 3,
    }


def test_metrics_are_what_prometheus_reads(tokenizer):
    with served(FakeEngine(tokenizer, "abc"), tokenizer) as server:
        assert post(server, CHAT).status_code == 200
        assert post(server, {**CHAT, "n": 0}).status_code == 400
        response = httpx.get(f"{server.url}/metrics")
    families = {f.name: f for f in text_string_to_metric_families(response.text)}
    samples = {
        (s.name, *sorted(s.labels.values())): s.value for f in families.values() for s in f.samples
    }
    assert samples["rap_memory_used_bytes",] == 700
    assert samples["rap_memory_held_bytes", "kv_cache"] == 70
    assert samples["rap_blocks_removed", "attn"] == 2
    assert samples["rap_tokens_total", "refilled"] == 7
    assert samples["rap_plan_switches_total",] == 3
    assert samples["rap_weights_unreadable",] == 1
    assert samples["rap_requests_total", "chat", "ok"] == 1
    assert samples["rap_requests_total", "chat", "invalid_value"] == 1
    assert samples["rap_time_to_first_token_seconds_count",] == 1
    items = {(s.labels["kind"], s.labels["level"]): s.value for s in families["rap_items"].samples}
    assert {labels: count for labels, count in items.items() if count} == {
        ("attn", "removed"): 2, ("attn", "native"): 2,
        ("ffn", "removed"): 1, ("ffn", "int8"): 1, ("ffn", "native"): 2,
        ("cache", "removed"): 2, ("cache", "int4"): 2, ("embeddings", "native"): 1,
    }  # fmt: skip
    assert items["ffn", "int4"] == 0
