"""Spans of answers: their phases, their parent, and a collector that does not answer."""

from __future__ import annotations

import logging
import sys

import httpx
import pytest

from rap_env.errors import MissingDependencyError

pytest.importorskip("opentelemetry.sdk.trace", reason="the extra otel is not installed")
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from rap_env.serving.settings import ServerSettings
from rap_env.serving.stack import serve
from rap_env.serving.tracing import Traces
from tests.serving.conftest import served
from tests.serving.fake_engine import FakeEngine
from tests.serving.test_bad_clients import eventually

TRACE, PARENT = 0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331


def spans_of(tokenizer, engine, exporter, **body):
    with served(engine, tokenizer) as server:
        server.service.traces = Traces("tiny", exporter)
        headers = {"traceparent": f"00-{TRACE:032x}-{PARENT:016x}-01", "x-request-id": "mine"}
        asked = {"model": "tiny", "prompt": "xy", **body}
        httpx.post(f"{server.url}/v1/completions", json=asked, headers=headers)
        traces = server.service.traces
        eventually(lambda: traces._provider.force_flush() and exporter.get_finished_spans())
    return {span.name: span for span in exporter.get_finished_spans()}


def test_an_answer_is_a_span_with_three_phases(tokenizer):
    engine = FakeEngine(tokenizer, "abc", pace_s=0.02)
    spans = spans_of(tokenizer, engine, InMemorySpanExporter())
    assert spans.keys() == {"queue", "prefill", "decode", "generate tiny"}
    whole = spans["generate tiny"]
    assert (whole.context.trace_id, whole.parent.span_id) == (TRACE, PARENT)
    assert whole.attributes["gen_ai.usage.input_tokens"] == 2
    assert whole.attributes["gen_ai.usage.output_tokens"] == 3
    assert whole.attributes["rap.request_id"] == "mine"
    phases = [spans[name] for name in ("queue", "prefill", "decode")]
    assert {phase.parent.span_id for phase in phases} == {whole.context.span_id}
    ends = [phase.end_time for phase in phases]
    assert [whole.start_time, *ends[:2]] == [phase.start_time for phase in phases]
    assert ends[2] == whole.end_time
    assert whole.end_time - phases[2].start_time >= 0.04e9


def test_an_answer_that_fails_before_a_token_is_an_error(tokenizer):
    engine = FakeEngine(tokenizer, "", end="error", error="It broke.")
    spans = spans_of(tokenizer, engine, InMemorySpanExporter())
    assert not spans["generate tiny"].status.is_ok
    assert spans["generate tiny"].attributes["gen_ai.response.finish_reasons"] == ("error",)


def test_a_collector_that_fails_is_one_line_of_the_log(tokenizer, caplog):
    class Down(InMemorySpanExporter):
        def export(self, spans):
            super().export(spans)
            if len(self.get_finished_spans()) < 5:
                raise ConnectionError("nobody listens")
            return SpanExportResult.SUCCESS

    caplog.set_level(logging.INFO, logger="rap_env.serving.tracing")
    traces = Traces("tiny", Down())
    for _ in range(6):
        traces._tracer.start_span("one").end()
        traces._provider.force_flush()
    traces.close()
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


def test_a_missing_extra_is_named_before_the_model_is_loaded(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'rap-env\[otel\]'"):
        serve(ServerSettings(model="absent", traces=True), print)
