"""A real server's policy: answers above its quality floor, and the levels that it makes."""

from types import SimpleNamespace

import httpx
import pytest

from rap_env.errors import RapError
from rap_env.memory import MemoryModel
from rap_env.models.files import model_folder
from rap_env.plan import Plan
from rap_env.policies.knapsack import KnapsackPolicy
from rap_env.policies.packaged_files import default_facts
from rap_env.request import parse_bytes
from rap_env.runtime.memory_estimator import BatchShape
from rap_env.runtime.memory_limit import LiveLimit
from rap_env.runtime.memory_monitor import TensorMeter
from rap_env.serving.served_model import choose_policy
from rap_env.serving.settings import ServerSettings
from rap_env.serving.stack import build_stack
from rap_env.serving.startup import check_before_loading
from tests.models.states import saved
from tests.models.tiny_gguf import write_tiny_gguf
from tests.policies.test_knapsack import costs
from tests.serving.background import BackgroundServer
from tests.serving.conftest import dense_engine, served, tiny_stack
from tests.serving.test_app import PLAIN, error_of, post
from tests.tiny import tiny_llm

FLOOR = 2.0
ASKED = {**PLAIN, "max_tokens": 20}


def knapsack_of(memory):
    """A knapsack with random costs of all levels."""
    return KnapsackPolicy(memory, costs(memory.facts, caches=("int8", "int4")))


def stack_of(tokenizer, read_budget, max_delta_nll=None, **settings):
    return tiny_stack(tokenizer, knapsack_of, read_budget, max_delta_nll=max_delta_nll, **settings)


def peak_of(stack):
    """What the native model needs for one request."""
    return stack.engine.controller.estimator.peak_bytes(Plan(), BatchShape(1, 21))


def test_every_answer_is_above_the_floor_and_every_refusal_a_503_that_says_why(tokenizer):
    budget = 10**9
    stack = stack_of(tokenizer, lambda: budget, max_delta_nll=FLOOR, queue_timeout_s=0.2)
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


def refusal(response, code="insufficient_quality"):
    """The message of a response that refuses a request because of the floor."""
    error = error_of(response, 503)
    assert error["code"] == code
    assert "retry-after" in response.headers
    assert "nats per token (max_delta_nll" in error["message"]
    return error["message"]


def test_a_fixed_budget_in_which_nothing_fits_above_the_floor_is_refused_at_the_start(tokenizer):
    llm = tiny_llm(layers=3, tokenizer=tokenizer)
    budget = MemoryModel(llm).native_peak_bytes(1, 1) // 2
    given = {"llm": llm, "policy": knapsack_of(MemoryModel(llm)), "meter": TensorMeter(llm)}
    assert build_stack(ServerSettings(model_memory=budget, max_delta_nll=None), **given).app
    with pytest.raises(RapError, match="max_delta_nll. fits .*; raise model_memory"):
        build_stack(ServerSettings(model_memory=budget, max_delta_nll=0.0), **given)


def test_a_request_may_ask_for_a_stricter_floor(tokenizer):
    budget = 10**9
    stack = stack_of(tokenizer, lambda: budget, max_delta_nll=FLOOR, queue_timeout_s=0.2)
    budget = int(0.8 * peak_of(stack))
    with BackgroundServer(stack.app) as server:
        answer = post(server, ASKED, "completions").json()
        best = answer["rap"]["delta_nll"]
        assert 0.1 < best < FLOOR
        message = refusal(post(server, {**ASKED, "max_delta_nll": 0.1}, "completions"))
        assert "at most 0.1 nats per token (max_delta_nll)" in message
        assert f"has {best:.4g}" in message
        assert post(server, {**ASKED, "max_delta_nll": best}, "completions").status_code == 200
        wrong = error_of(post(server, {**ASKED, "max_delta_nll": -1}, "completions"), 400)
        assert wrong["param"] == "max_delta_nll"
    with served(dense_engine(tiny_llm(tokenizer=tokenizer)), tokenizer) as server:
        wrong = error_of(post(server, {**ASKED, "max_delta_nll": 1.0}, "completions"), 400)
        assert "needs a policy that predicts" in wrong["message"]


def test_without_predictions_there_is_no_default_floor_and_the_log_says_so(tokenizer, caplog):
    for policy, floor in (("dense", None), (None, 0.1)):
        llm = tiny_llm(layers=3, tokenizer=tokenizer)
        given = {} if policy else {"policy": knapsack_of(MemoryModel(llm))}
        caplog.clear()
        with caplog.at_level("INFO", "rap_env.serving.served_model"):
            stack = build_stack(
                ServerSettings(policy=policy or "knapsack", model_memory="1GiB"), llm=llm, **given
            )
        assert stack.engine.controller.chooser.max_delta_nll == floor
        assert ("dense predicts no rise in NLL, so answers" in caplog.text) == (floor is None)


@pytest.mark.parametrize(
    ("limit", "made", "expected"),
    [
        (None, False, ("int4",)),
        ("130MiB", False, ("int4",)),
        ("75MiB", False, ("int4", "int4-compact", "int3", "int2")),
        ("130MiB", True, ("int4", "int4-compact", "int3", "int2")),
    ],
)
def test_levels_that_take_minutes_to_make_are_made_where_a_short_request_needs_them(
    limit, made, expected, caplog
):
    def absent(levels):
        return frozenset(() if made else (n for n in levels if n != "int4"))

    caplog.set_level("INFO")
    llm = SimpleNamespace(facts=default_facts(), absent_levels=absent)
    limited = None if limit is None else LiveLimit("model_memory", parse_bytes("limit", limit))
    policy = choose_policy(ServerSettings(), llm, limited)
    assert policy.weight_levels == expected
    assert ("rap prepare smollm2-135m" in caplog.text) == (expected == ("int4",))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy": "rap"}, "smollm2-135m"),
        ({"max_delta_nll": 0.1}, "max_delta_nll=0.1 needs a policy that predicts"),
    ],
)
def test_what_a_model_lacks_is_said_before_its_weights_are_read(
    settings, message, own_cache, tmp_path
):
    folder = saved(tmp_path / "model")
    with pytest.raises(RapError, match=message):
        check_before_loading(ServerSettings(model=str(folder), device="cpu", **settings))


def test_a_file_is_converted_in_another_process_for_this(own_cache, tmp_path, monkeypatch):
    apart = []

    def noted(make, *args):
        apart.append(args)
        return make(*args)

    monkeypatch.setattr(model_folder, "in_child", noted)
    write_tiny_gguf(tmp_path / "tiny.gguf")
    settings = ServerSettings(model=str(tmp_path / "tiny.gguf"), device="cpu", policy="rap")
    with pytest.raises(RapError, match="smollm2-135m"):
        check_before_loading(settings)
    assert len(apart) == 1
