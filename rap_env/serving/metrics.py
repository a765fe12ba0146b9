"""Prometheus metrics: memory, budget, plan, queue, requests and latencies."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from rap_env.blocks import KINDS
from rap_env.levels import WEIGHT_LEVELS
from rap_env.plan import EMBEDDINGS, CompressionPlan, cache_name, is_cache, item_names
from rap_env.runtime.memory_meter import ResidentMeter
from rap_env.runtime.process_memory import ProcessMemory
from rap_env.runtime.request_handle import AdmitEvent, EndEvent, Event, Reason, TokenEvent
from rap_env.serving.settings import ServerSettings
from rap_env.version import __version__

if TYPE_CHECKING:
    from rap_env.runtime.engine import Engine
    from rap_env.runtime.memory_monitor import MemoryMonitor

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PER_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_REQUEST_S = (*_PER_TOKEN_S[3:], 30, 60, 120, 300, 600)
_TOKENS = tuple(2**n for n in range(16))
_HISTOGRAMS = {
    "queue_s": (
        "queue_time_seconds",
        "From a request's arrival until it leaves the queue, admitted or not.",
        (*_PER_TOKEN_S[:3], *_REQUEST_S),
    ),
    "first_token_s": (
        "time_to_first_token_seconds", "From a request's arrival to its first token.", _REQUEST_S,
    ),
    "between_tokens_s": (
        "inter_token_latency_seconds", "Between two tokens of an answer.", _PER_TOKEN_S,
    ),
    "per_token_s": (
        "time_per_output_token_seconds", "Mean of an answer's tokens after the first.",
        _PER_TOKEN_S,
    ),
    "answer_s": (
        "answer_duration_seconds", "From a request's arrival to the end of its answer.",
        _REQUEST_S,
    ),
    "prompt_tokens": ("prompt_length_tokens", "Tokens of a prompt.", _TOKENS),
    "answer_tokens": ("answer_length_tokens", "Tokens of an answer.", (0, *_TOKENS)),
}  # fmt: skip
"""Histograms by attribute: name without ``rap_``, description, upper limits of the buckets."""


class ServingMetrics:
    """Counters and histograms of the server; each scrape also reads the engine's state.

    Histograms count each answer that the engine accepted into its queue, however it ended.

    Attributes:
        requests: Requests by endpoint and outcome: ``ok``, ``disconnected``, or the code of
            the error response.
        refused_connections: Connections above the limit that were answered with an error.
        queue_s: Seconds from arrival to admission, or to the end if it came before.
        first_token_s: Seconds from arrival to first token.
        between_tokens_s: Seconds between two tokens.
        per_token_s: Mean seconds per token after the first, one value per answer.
        answer_s: Seconds from arrival to the end.
        prompt_tokens: Lengths of prompts.
        answer_tokens: Lengths of answers.
    """

    queue_s: Histogram
    first_token_s: Histogram
    between_tokens_s: Histogram
    per_token_s: Histogram
    answer_s: Histogram
    prompt_tokens: Histogram
    answer_tokens: Histogram

    def __init__(self, engine: Engine, settings: ServerSettings) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "rap_requests", "Requests by endpoint and outcome.", ["endpoint", "outcome"],
            registry=self._registry,
        )  # fmt: skip
        self.refused_connections = Counter(
            "rap_connections_refused", "Connections above the limit that got an error response.",
            registry=self._registry,
        )  # fmt: skip
        for attribute, (name, text, buckets) in _HISTOGRAMS.items():
            made = Histogram(f"rap_{name}", text, buckets=buckets, registry=self._registry)
            setattr(self, attribute, made)
        self._registry.register(_EngineState(engine, settings))
        ProcessCollector(registry=self._registry)

    def render(self) -> bytes:
        """Return the metrics in the Prometheus text format."""
        return generate_latest(self._registry)


class AnswerTimer:
    """Measures one answer from the events of the engine, and counts it in the histograms.

    Args:
        metrics: The histograms.
        prompt_tokens: Tokens of the prompt.
        arrived_s: Time of arrival on the engine's clock.

    Attributes:
        queue_s: Seconds in the queue until the first admission; None before.
        first_token_s: Seconds from arrival to the first token; None before.
        prompt_tokens: Tokens of the prompt.
        tokens: Tokens generated so far.
        seconds: From arrival to the end; 0 before.
        reason: Why it ended; None before.
    """

    def __init__(self, metrics: ServingMetrics, prompt_tokens: int, arrived_s: float) -> None:
        self._metrics = metrics
        self.prompt_tokens = prompt_tokens
        self._arrived_s = arrived_s
        self._last_s = arrived_s
        self.queue_s: float | None = None
        self.first_token_s: float | None = None
        self.tokens = 0
        self.seconds = 0.0
        self.reason: Reason | None = None

    def add(self, event: Event) -> None:
        """Take in an event; in their order."""
        seconds = max(0.0, event.time_s - self._arrived_s)
        if isinstance(event, TokenEvent):
            self.tokens += 1
            if self.first_token_s is None:
                self.first_token_s = seconds
                self._metrics.first_token_s.observe(seconds)
            else:
                self._metrics.between_tokens_s.observe(max(0.0, event.time_s - self._last_s))
            self._last_s = event.time_s
        elif isinstance(event, AdmitEvent | EndEvent):
            if self.queue_s is None:
                self.queue_s = seconds
                self._metrics.queue_s.observe(seconds)
            if isinstance(event, EndEvent):
                self.seconds, self.reason = seconds, event.reason
                self._end()

    def _end(self) -> None:
        metrics = self._metrics
        metrics.answer_s.observe(self.seconds)
        metrics.prompt_tokens.observe(self.prompt_tokens)
        metrics.answer_tokens.observe(self.tokens)
        if self.tokens > 1 and self.first_token_s is not None:
            after_first_s = self._last_s - self._arrived_s - self.first_token_s
            metrics.per_token_s.observe(max(0.0, after_first_s) / (self.tokens - 1))


class _EngineState(Collector):
    """Reads the engine once per scrape."""

    def __init__(self, engine: Engine, settings: ServerSettings) -> None:
        self._engine = engine
        self._settings = settings
        self._num_layers = engine.controller.estimator.memory.facts.num_layers

    def describe(self) -> Iterable[Metric]:
        """Return nothing; otherwise the registry would scrape immediately to learn the names."""
        return []

    def collect(self) -> Iterable[Metric]:
        """Metrics of the engine's state."""
        stats, controller = self._engine.stats(), self._engine.controller
        chooser, plans = controller.chooser, controller.plans
        names = {"model": self._settings.served_name, "policy": chooser.policy.name}
        yield InfoMetricFamily("rap_build", "What serves.", {"version": __version__, **names})
        items = GaugeMetricFamily(
            "rap_items", "Items of the model by kind and level.", labels=["kind", "level"]
        )
        for labels, count in sorted(_items_by_level(stats.plan, self._num_layers).items()):
            items.add_metric(labels, count)
        yield items

        gauge, counter = GaugeMetricFamily, CounterMetricFamily
        counts = {kind: stats.mask.count(kind) for kind in KINDS}
        held = {"weights": stats.held.weights, "kv_cache": stats.held.kv_cache}
        answers = {n: getattr(stats, n) for n in ("served", "refused", "cancelled", "failed")}
        tokens = {"prompt": stats.prompt_tokens, "generated": stats.tokens}
        for family, name, text, label, values in (
            (gauge, "blocks_removed", "Removed blocks by kind.", "kind", counts),
            (gauge, "memory_held_bytes", "Bytes of tensors in memory.", "part", held),
            (counter, "answers",
             "Answers by how they ended in the engine; a stop string cancels what would follow.",
             "outcome", answers),
            (counter, "tokens", "Tokens by where they are.", "part", tokens),
        ):  # fmt: skip
            metric = family(f"rap_{name}", text, labels=[label])
            for key, value in values.items():
                metric.add_metric([key], value)
            yield metric
        for family, name, text, value in (
            (gauge, "memory_used_bytes", "Measured bytes that the model takes.",
             stats.used_bytes),
            (gauge, "memory_budget_bytes", "Bytes that the model may take.", stats.budget_bytes),
            (gauge, "memory_margin_bytes", "Bytes of the budget that stay free for what is not "
             "predicted.", stats.margin_bytes),
            (gauge, "weights_unreadable", "Items whose weights cannot be read, and that stay out.",
             len(plans.unreadable.items)),
            (gauge, "ready", "Whether requests can be served (1), as /readyz reports, or not (0).",
             self._engine.unready_reason() is None),
            (gauge, "queue_length", "Answers that wait.", stats.queued),
            (gauge, "running", "Answers that are being generated.", stats.running),
            (counter, "preemptions", "Answers put back into the queue.", stats.preemptions),
            (counter, "interruptions", "Prefill chunks ended early because the budget fell.",
             stats.interruptions),
            (counter, "plan_switches", "Changes of the plan.", plans.switches),
            (counter, "plan_decisions", "Times that a plan was chosen.", chooser.decisions),
            (counter, "decisions_lost", "Changes of the plan that the log of decisions lacks.",
             plans.lost_decisions),
            (counter, "controller_overhead_seconds", "Time spent on choosing and switching plans.",
             stats.overhead_s),
            (counter, "busy_seconds", "Time spent in steps of the engine.", stats.busy_s),
        ):  # fmt: skip
            yield family(f"rap_{name}", text, value=value)
        yield from _limit_metrics(controller.monitor)


def _limit_metrics(monitor: MemoryMonitor) -> Iterable[Metric]:
    """The limit, by what it is a limit of, and what is resident besides the model."""
    source, meter = monitor.source, monitor.meter
    limit = GaugeMetricFamily(
        "rap_memory_limit_bytes", "The memory limit: of the whole process, or of the model.",
        labels=["of"],
    )  # fmt: skip
    if isinstance(source, ProcessMemory):
        limit.add_metric(["process"], source.process_bytes)
    else:
        limit.add_metric(["model"], monitor.budget_bytes)
    yield limit
    if isinstance(meter, ResidentMeter):
        yield GaugeMetricFamily(
            "rap_memory_other_bytes", "Resident bytes of everything but the model.",
            value=meter.baseline_bytes,
        )  # fmt: skip


def _items_by_level(plan: CompressionPlan, num_layers: int) -> Tally[tuple[str, str]]:
    """Numbers of items by kind (as an item's name ends) and level; common levels also if 0.

    The cache of a removed attention block counts as removed.
    """
    kinds = (*KINDS, "cache", EMBEDDINGS)
    found: Tally[tuple[str, str]] = Tally(
        {(kind, level): 0 for kind in kinds for level in WEIGHT_LEVELS}
    )
    gone = {cache_name(index // 2) for index in plan.removed.indices if index % 2 == 0}
    levels = plan.levels | dict.fromkeys(gone, "removed")
    for item in item_names(num_layers):
        kind = "cache" if is_cache(item) else item.rpartition(".")[2]
        found[kind, levels.get(item, "native")] += 1
    return found
