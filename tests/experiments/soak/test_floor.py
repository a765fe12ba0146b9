"""A server with a floor of quality under moving budgets, on a tiny model."""

from __future__ import annotations

import httpx
import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from experiments.config.serving import SoakConfig
from experiments.soak.floor import REASONS, Responses, serve_above_floor, summary
from tests.serving.test_quality_floor import FLOOR, peak_of, stack_of
from tests.serving.tokenizers import chat_tokenizer


@pytest.fixture
def serve():
    """Serves under moving budgets with a floor; gives the record checked against a limit."""

    def run(limit):
        budgets = [10**9]
        given = {"max_delta_nll": FLOOR, "queue_timeout_s": 0.1}
        stack = stack_of(chat_tokenizer(), lambda: budgets[-1], **given)
        sizes = [str(int(share * peak_of(stack))) for share in (0.3, 1.2)]
        soak = SoakConfig(
            requests=40, clients=3, prompt_tokens=20, answer_tokens=8, phase_s=0.03,
            floor_budgets=sizes,
        )  # fmt: skip
        return serve_above_floor(stack, limit, budgets, soak, 0)

    return run


def test_no_pass_and_no_answer_is_below_the_floor_and_refusals_say_why(serve):
    record = serve(FLOOR)
    assert record["passed"], record["problems"]
    assert record["requests"] == 40
    assert set(record["outcomes"]) - {"insufficient_memory"} == {"answered", "insufficient_quality"}
    assert 0 < record["max_delta_nll_of_a_pass"] <= FLOOR
    assert record["passes_below_floor"] == 0
    assert summary(record).endswith("All checks passed.")


def test_passes_below_a_stricter_floor_fail_the_check(serve):
    record = serve(0.001)
    assert record["passes_below_floor"] > 0
    assert "FAILED: no_pass_below_the_floor" in summary(record)


def test_a_refusal_without_a_reason_or_with_another_status_is_a_problem():
    found = Responses()
    error = {"error": {"code": "internal_error", "message": "?"}}
    found.add(httpx.Response(500, json=error, headers={"retry-after": "1"}))
    found.add(httpx.Response(503, json={"error": {"code": REASONS[0], "message": "below"}}))
    assert [problem[:3] for problem in found.problems] == ["500", "503"]
