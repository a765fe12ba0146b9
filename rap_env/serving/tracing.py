"""OpenTelemetry traces of answers (extra ``otel``): their time in the queue, prefill and decode."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rap_env.errors import MissingDependencyError
from rap_env.serving.metrics import AnswerTimer
from rap_env.version import __version__

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

log = logging.getLogger(__name__)


def require_tracing() -> None:
    """Check that the packages of the extra ``otel`` are installed.

    Raises:
        MissingDependencyError: One is not.
    """
    try:
        import opentelemetry.exporter.otlp.proto.http.trace_exporter
        import opentelemetry.sdk.trace  # noqa: F401
    except ImportError as error:
        package = "opentelemetry-exporter-otlp-proto-http"
        raise MissingDependencyError(package, "traces", "otel") from error


class Traces:
    """Sends a span for each answer, with the spans ``queue``, ``prefill`` and ``decode`` below it.

    Spans are sent from a thread of their own. If the collector does not take them, they are lost,
    and one line is logged.

    Args:
        model: Name of the model for clients.
        exporter: Where spans go; by default, by OTLP over HTTP to where the environment variables
            of OpenTelemetry (``OTEL_EXPORTER_OTLP_ENDPOINT`` and others) say.

    Raises:
        MissingDependencyError: The extra ``otel`` is not installed.
    """

    def __init__(self, model: str, exporter: SpanExporter | None = None) -> None:
        require_tracing()
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        if exporter is None:
            # It logs each failure with its attempts.
            logging.getLogger("opentelemetry.exporter").setLevel(logging.CRITICAL)
            exporter = OTLPSpanExporter()
        self._model = model
        resource = Resource.create({"service.name": "rap-env", "service.version": __version__})
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(_logged(exporter)))
        self._tracer = self._provider.get_tracer("rap_env", __version__)

    def add(self, timer: AnswerTimer, headers: Mapping[str, str], request_id: str) -> None:
        """Send the spans of an answer that has just ended; from any thread.

        Args:
            timer: Its times.
            headers: Headers of its request. With ``traceparent``, the span belongs to that trace.
            request_id: The id of its request.
        """
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        parent = TraceContextTextMapPropagator().extract(dict(headers))
        start_ns = time.time_ns() - int(1e9 * timer.seconds)
        span = self._tracer.start_span(
            f"generate {self._model}",
            parent,
            kind=trace.SpanKind.SERVER,
            start_time=start_ns,
            attributes={
                "gen_ai.operation.name": "generate_content",
                "gen_ai.request.model": self._model,
                "gen_ai.usage.input_tokens": timer.prompt_tokens,
                "gen_ai.usage.output_tokens": timer.tokens,
                "gen_ai.response.finish_reasons": [timer.reason or ""],
                "rap.request_id": request_id,
            },
        )
        if timer.reason == "error":
            span.set_status(trace.StatusCode.ERROR)
        below = trace.set_span_in_context(span, parent)
        queue_s = timer.seconds if timer.queue_s is None else timer.queue_s
        first_s = timer.seconds if timer.first_token_s is None else timer.first_token_s
        self._phase("queue", below, start_ns, 0.0, queue_s)
        if timer.seconds > queue_s:
            self._phase("prefill", below, start_ns, queue_s, first_s)
        if timer.seconds > first_s:
            self._phase("decode", below, start_ns, first_s, timer.seconds)
        span.end(start_ns + int(1e9 * timer.seconds))

    def close(self) -> None:
        """Send what is left, and end the thread."""
        self._provider.shutdown()

    def _phase(self, name: str, parent: Context, start_ns: int, from_s: float, to_s: float) -> None:
        span = self._tracer.start_span(name, parent, start_time=start_ns + int(1e9 * from_s))
        span.end(start_ns + int(1e9 * to_s))


def _logged(exporter: SpanExporter) -> SpanExporter:
    """An exporter that logs the first of failures in a row."""
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

    class Logged(SpanExporter):
        failing = False

        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            try:
                result = exporter.export(spans)
            except Exception:
                result = SpanExportResult.FAILURE
            failed = result is not SpanExportResult.SUCCESS
            if failed and not self.failing:
                log.warning("Traces cannot be sent, and are lost until they can.")
            elif self.failing and not failed:
                log.info("Traces can be sent again.")
            self.failing = failed
            return result

        def shutdown(self) -> None:
            exporter.shutdown()

    return Logged()
