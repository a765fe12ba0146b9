"""Histograms of answers, and labels whose number does not grow with plans."""

from __future__ import annotations

import re

import pytest

from rap_env.plan import Plan
from rap_env.runtime.request_handle import AdmitEvent, EndEvent, PlanEvent, TokenEvent
from rap_env.serving.metrics import AnswerTimer, ServingMetrics
from rap_env.serving.settings import ServerSettings
from tests.serving.fake_engine import NATIVE, FakeEngine


@pytest.fixture
def engine(tokenizer):
    return FakeEngine(tokenizer)


@pytest.fixture
def metrics(engine):
    return ServingMetrics(engine, ServerSettings())


def sums(metrics):
    """Number and sum of the values of each histogram."""
    text = metrics.render().decode()
    counts = dict(re.findall(r"^rap_(\w+)_count (\S+)$", text, re.MULTILINE))
    found = dict(re.findall(r"^rap_(\w+)_sum (\S+)$", text, re.MULTILINE))
    return {name: (float(counts[name]), pytest.approx(float(found[name]))) for name in counts}


def token(time_s):
    return TokenEvent(5, -0.5, time_s, NATIVE)


def test_an_answer_is_measured_from_its_events(metrics):
    timer = AnswerTimer(metrics, 7, arrived_s=100.0)
    events = [
        AdmitEvent(103.0), PlanEvent(NATIVE, 103.5), token(104.0), token(104.5),
        AdmitEvent(106.0),  # after a preemption
        token(107.0), EndEvent("length", None, 107.0),
    ]  # fmt: skip
    for event in events:
        timer.add(event)
    assert (timer.queue_s, timer.first_token_s) == (3.0, 4.0)
    assert sums(metrics) == {
        "queue_time_seconds": (1, 3.0),
        "time_to_first_token_seconds": (1, 4.0),
        "inter_token_latency_seconds": (2, 3.0),
        "time_per_output_token_seconds": (1, 1.5),
        "answer_duration_seconds": (1, 7.0),
        "prompt_length_tokens": (1, 7),
        "answer_length_tokens": (1, 3),
    }


def test_an_answer_that_is_rejected_counts_its_time_in_the_queue(metrics):
    timer = AnswerTimer(metrics, 7, arrived_s=100.0)
    timer.add(EndEvent("error", "It waited.", 220.0, "queue_timeout"))
    found = sums(metrics)
    assert found["queue_time_seconds"] == found["answer_duration_seconds"] == (1, 120.0)
    assert found["answer_length_tokens"] == (1, 0)
    assert found["time_to_first_token_seconds"] == found["inter_token_latency_seconds"] == (0, 0)


def test_another_plan_makes_no_other_series(engine, metrics):
    def series():
        return {line.split(" ")[0] for line in metrics.render().decode().splitlines()}

    before, stats = series(), engine.stats()
    stats.plan = Plan.uniform(4, weights="int4", caches="int8", embeddings="int8")
    engine.stats = lambda: stats
    assert series() == before
