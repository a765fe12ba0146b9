"""The server under a quality floor: answers above it, and 503 with the reason for all others."""

from __future__ import annotations

import httpx
import pytest

from rap_env.errors import RapError
from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.policies.knapsack import KnapsackPolicy
from rap_env.runtime.batch_shape import BatchShape
from rap_env.runtime.memory_meter import TensorMeter
from rap_env.runtime.memory_source import GivenMemory
from rap_env.serving.server import BackgroundServer
from rap_env.serving.settings import ServerSettings
from rap_env.serving.stack import build_stack, greeting
from tests.policies.test_knapsack import costs
from tests.serving.conftest import served
from tests.serving.fake_engine import FakeEngine
from tests.serving.test_app import PLAIN, error_of, post
from tests.tiny import tiny_llm

FLOOR = 2.0
ASKED = {**PLAIN, "max_tokens": 20}


def knapsack_of(llm):
    """A knapsack with random costs of all levels."""
    memory = MemoryModel(llm)
    return KnapsackPolicy(memory, costs(memory.facts, caches=("int8", "int4")))


def stack_of(tokenizer, read_budget, max_delta_nll=None, **settings):
    llm = tiny_llm(layers=3, tokenizer=tokenizer)
    llm.set_residency("offload")
    return build_stack(
        ServerSettings(
            model_name="tiny", shutdown_grace_s=5.0, max_delta_nll=max_delta_nll, **settings
        ),
        llm=llm,
        policy=knapsack_of(llm),
        memory=GivenMemory(read_budget),
        meter=TensorMeter(llm),
        hold_s=0.0,
    )


def peak_of(stack):
    """What the native model needs for one request."""
    return stack.engine.controller.estimator.peak_bytes(Plan(), BatchShape(1, 21))


def test_every_answer_is_above_the_floor_and_every_refusal_a_503_that_says_why(tokenizer):
    budget = 10**9
    stack = stack_of(tokenizer, lambda: budget, max_delta_nll=FLOOR, queue_timeout_s=0.2)
    text = greeting(stack, "http://here")
    assert "at most 2.0 nats per token (max_delta_nll) only" in text
    assert "Prompts may have 63 tokens." in text
    rises, refused = [], 0
    with BackgroundServer(stack.app) as server:
        for share in (1.2, 0.95, 0.9, 0.8, 0.7, 0.6, 0.4, 0.1, 1.2):
            budget = int(share * peak_of(stack))
            response = post(server, ASKED, "completions")
            if response.status_code == 200:
                rises.append(response.json()["rap"]["delta_nll"])
                continue
            refused += 1
            code = "insufficient_memory" if share == 0.1 else "insufficient_quality"
            message = refusal(response, code)
            assert "waited longer than 0.2 s" in message
            assert f"{budget:,} bytes" in message
            if share == 0.1:
                ready = httpx.get(f"{server.url}/readyz")
                assert ready.status_code == 503
                assert "(max_delta_nll) fits a request of one token" in ready.json()["reason"]
    assert refused > 1
    assert rises[0] == rises[-1] == 0.0
    assert 0 < max(rises) <= FLOOR


@pytest.mark.parametrize("stream", [False, True])
def test_what_never_fits_above_the_floor_is_refused_at_once(tokenizer, stream):
    budget = 10**9
    stack = stack_of(tokenizer, lambda: budget, max_delta_nll=0.0)
    budget = stack.engine.controller.monitor.max_budget_bytes = peak_of(stack) - 1
    with BackgroundServer(stack.app) as server:
        message = refusal(post(server, {**ASKED, "stream": stream}, "completions"))
        assert f"largest expected budget of {budget:,} bytes" in message
        assert post(server, {**ASKED, "max_tokens": 2}, "completions").status_code == 200


def refusal(response, code="insufficient_quality"):
    """The message of a response that refuses a request because of the floor."""
    error = error_of(response, 503)
    assert error["code"] == code
    assert "retry-after" in response.headers
    assert "nats per token (max_delta_nll" in error["message"]
    return error["message"]


def test_a_fixed_budget_in_which_nothing_fits_above_the_floor_is_refused_at_the_start(tokenizer):
    llm = tiny_llm(layers=3, tokenizer=tokenizer)
    budget = MemoryModel(llm).dense_peak_bytes(1, 1) // 2
    for floor in (None, 0.0):
        settings = ServerSettings(model_memory=budget, max_delta_nll=floor)
        given = {"llm": llm, "policy": knapsack_of(llm), "meter": TensorMeter(llm)}
        if floor is None:
            assert build_stack(settings, **given).app
            continue
        with pytest.raises(RapError, match=f"{budget:,} bytes, in which one token .* max_delta"):
            build_stack(settings, **given)


def test_a_policy_that_predicts_nothing_is_refused_at_the_start(tokenizer):
    settings = ServerSettings(policy="dense", model_memory="1GiB", max_delta_nll=0.1)
    with pytest.raises(RapError, match="dense does not: choose such a policy, or set max_delta"):
        build_stack(settings, llm=tiny_llm(tokenizer=tokenizer))


def test_a_request_may_ask_for_a_stricter_floor_within_the_limit_of_the_server(tokenizer):
    budget = 10**9
    stack = stack_of(tokenizer, lambda: budget, min_quality_per_request=0.1, queue_timeout_s=0.2)
    budget = int(0.8 * peak_of(stack))
    with BackgroundServer(stack.app) as server:
        answer = post(server, ASKED, "completions").json()
        best = answer["rap"]["delta_nll"]
        assert best > 0.1
        message = refusal(post(server, {**ASKED, "max_delta_nll": 0.1}, "completions"))
        assert "at most 0.1 nats per token (max_delta_nll of the request)" in message
        assert f"has {best:.4g}" in message
        assert post(server, {**ASKED, "max_delta_nll": best}, "completions").status_code == 200
        error = error_of(post(server, {**ASKED, "max_delta_nll": 0.05}, "completions"), 400)
        assert error["param"] == "max_delta_nll"
        assert "0.1 or more (min_quality_per_request)" in error["message"]


def test_no_request_has_a_floor_of_its_own_unless_the_server_allows_it(tokenizer):
    with served(FakeEngine(tokenizer), tokenizer) as server:
        error = error_of(post(server, {**ASKED, "max_delta_nll": 1.0}, "completions"), 400)
    assert "no floor of their own (min_quality_per_request)" in error["message"]


def test_without_predictions_there_is_no_default_floor_and_the_log_says_so(tokenizer, caplog):
    for policy, floor in (("dense", None), (None, 0.1)):
        llm = tiny_llm(layers=3, tokenizer=tokenizer)
        given = {} if policy else {"policy": knapsack_of(llm)}
        caplog.clear()
        with caplog.at_level("INFO", "rap_env.serving.stack"):
            stack = build_stack(
                ServerSettings(policy=policy or "knapsack", model_memory="1GiB"), llm=llm, **given
            )
        assert stack.engine.controller.chooser.max_delta_nll == floor
        assert ("dense predicts no rise in NLL, so answers" in caplog.text) == (floor is None)


def test_floors_of_requests_need_a_policy_that_predicts(tokenizer):
    settings = ServerSettings(policy="dense", model_memory="1GiB", min_quality_per_request=0.0)
    with pytest.raises(RapError, match=r"min_quality_per_request=0.0 needs a policy"):
        build_stack(settings, llm=tiny_llm(tokenizer=tokenizer))
