"""Prometheus metrics: memory, budget, plan, queue, requests and latencies."""

from __future__ import annotations

import math
from collections import Counter as Tally
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from rap_env.levels import WEIGHT_LEVELS
from rap_env.plan import BLOCK_KINDS, EMBEDDINGS, Plan, cache_name, is_cache, item_names
from rap_env.runtime.memory_monitor import ResidentMeter
from rap_env.serving.settings import ServerSettings
from rap_env.version import __version__

if TYPE_CHECKING:
    from rap_env.runtime.engine import Engine

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PER_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_REQUEST_S = (*_PER_TOKEN_S[3:], 30, 60, 120, 300, 600)
_TOKENS = tuple(2**n for n in range(16))


class ServingMetrics:
    """Counters and histograms of the server; each scrape also reads the engine's state.

    Histograms count each answer that the engine accepted into its queue, however it ended.
    Requests are counted by endpoint and outcome: ``ok``, ``disconnected``, or the code of the
    error.
    """

    def __init__(self, engine: Engine, settings: ServerSettings) -> None:
        registry = self._registry = CollectorRegistry()

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"rap_{name}", text, buckets=buckets, registry=registry)

        self.requests = Counter(
            "rap_requests",
            "Requests by endpoint and outcome.",
            ["endpoint", "outcome"],
            registry=registry,
        )
        self.refused_requests = Counter(
            "rap_requests_refused",
            "Requests above max_open_requests, which got an error response.",
            registry=registry,
        )
        self.queue_s = histogram(
            "queue_time_seconds",
            "From a request's arrival until it leaves the queue, admitted or not.",
            (*_PER_TOKEN_S[:3], *_REQUEST_S),
        )
        self.first_token_s = histogram(
            "time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            _REQUEST_S,
        )
        self.between_tokens_s = histogram(
            "inter_token_latency_seconds", "Between two tokens of an answer.", _PER_TOKEN_S
        )
        self.answer_s = histogram(
            "answer_duration_seconds",
            "From a request's arrival to the end of its answer.",
            _REQUEST_S,
        )
        self.prompt_tokens = histogram("prompt_length_tokens", "Tokens of a prompt.", _TOKENS)
        self.answer_tokens = histogram(
            "answer_length_tokens", "Tokens of an answer.", (0, *_TOKENS)
        )
        registry.register(_EngineState(engine, settings))
        ProcessCollector(registry=registry)

    def render(self) -> bytes:
        """Return the metrics in the Prometheus text format."""
        return generate_latest(self._registry)


Reading = float | Mapping[tuple[str, ...], float]

_HELP = {
    "items": "Items of the model by kind and level.",
    "blocks_removed": "Removed blocks by kind.",
    "max_delta_nll": "Quality floor now, in nats per token; NaN without one.",
    "weights_unreadable": (
        "Whether the weights of a higher plan cannot be read (1), so that it waits."
    ),
    "plan_switches": "Changes of the plan.",
    "memory_held_bytes": "Bytes of tensors in memory.",
    "memory_limit_bytes": "The memory limit: of the whole process, or of the model.",
    "memory_used_bytes": "Measured bytes that the model takes.",
    "memory_budget_bytes": "Bytes that the model may take.",
    "memory_margin_bytes": "Bytes of the budget that stay free for what is not predicted.",
    "memory_other_bytes": "Resident bytes of everything but the model.",
    "kept_sequences": "Sequences that are kept for later requests; their bytes are the part kept.",
    "kept_file_bytes": "Bytes of the files in which sequences are kept (keep_file_bytes).",
    "ready": "Whether requests can be served (1), as /readyz reports, or not (0).",
    "queue_length": "Answers that wait.",
    "stalled_seconds": "Time for which answers have waited while none was generated.",
    "running": "Answers that are being generated.",
    "tokens": "Tokens by where they are.",
    "preemptions": "Answers put back into the queue.",
    "controller_overhead_seconds": "Time spent on choosing and switching plans.",
    "busy_seconds": "Time spent in steps of the engine.",
}
"""What each metric of the engine's state is, by its name without the prefix, in their order."""
_LABELS = {
    "items": ("kind", "level"),
    "blocks_removed": ("kind",),
    "memory_held_bytes": ("part",),
    "memory_limit_bytes": ("of",),
    "tokens": ("part",),
}
_COUNTERS = {
    "plan_switches",
    "tokens",
    "preemptions",
    "controller_overhead_seconds",
    "busy_seconds",
}


def _readings(engine: Engine) -> dict[str, Reading]:
    """The value of each metric, or its values by those of its labels."""
    stats, controller = engine.stats(), engine.controller
    monitor, floor = controller.monitor, controller.chooser.max_delta_nll
    num_layers = controller.estimator.memory.facts.num_layers
    budget_bytes, process_bytes = max(0, monitor.budget_bytes), monitor.source.process_bytes
    readings: dict[str, Reading] = {
        "items": _items_by_level(stats.plan, num_layers),
        "blocks_removed": {(kind,): stats.plan.count_removed(kind) for kind in BLOCK_KINDS},
        "max_delta_nll": math.nan if floor is None else floor,
        "weights_unreadable": bool(controller.switcher.unreadable),
        "plan_switches": controller.switcher.switches,
        "memory_held_bytes": {
            ("weights",): monitor.held.weights,
            ("kv_cache",): monitor.held.kv_cache,
            ("kept",): stats.kept_bytes,
        },
        "memory_limit_bytes": (
            {("model",): budget_bytes} if process_bytes is None else {("process",): process_bytes}
        ),
        "memory_used_bytes": monitor.used_bytes,
        "memory_budget_bytes": budget_bytes,
        "memory_margin_bytes": monitor.margin.bytes,
        "kept_sequences": stats.kept_sequences,
        "kept_file_bytes": stats.kept_file_bytes,
        "ready": engine.unready_reason() is None,
        "queue_length": stats.queued,
        "stalled_seconds": stats.stalled_s,
        "running": stats.running,
        "tokens": {
            ("prompt",): stats.prompt_tokens,
            ("repeated",): stats.repeated_tokens,
            ("kept",): stats.kept_tokens,
            ("refilled",): stats.refilled_tokens,
            ("generated",): stats.tokens,
        },
        "preemptions": stats.preemptions,
        "controller_overhead_seconds": stats.overhead_s,
        "busy_seconds": stats.busy_s,
    }
    if isinstance(monitor.meter, ResidentMeter):
        readings["memory_other_bytes"] = monitor.meter.baseline_bytes
    return readings


class _EngineState(Collector):
    """Reads the engine once per scrape."""

    def __init__(self, engine: Engine, settings: ServerSettings) -> None:
        self._engine = engine
        self._settings = settings

    def describe(self) -> Iterable[Metric]:
        """Return nothing; otherwise the registry would scrape immediately to learn the names."""
        return []

    def collect(self) -> Iterable[Metric]:
        """Metrics of the engine's state."""
        about = {
            "version": __version__,
            "model": self._settings.served_name,
            "policy": self._engine.controller.chooser.policy.name,
        }
        yield InfoMetricFamily("rap_build", "What serves.", about)
        readings = _readings(self._engine)
        for name in filter(readings.__contains__, _HELP):
            kind = CounterMetricFamily if name in _COUNTERS else GaugeMetricFamily
            metric = kind(f"rap_{name}", _HELP[name], labels=_LABELS.get(name, ()))
            reading = readings[name]
            values = reading if isinstance(reading, Mapping) else {(): reading}
            for labels, value in values.items():
                metric.add_metric(labels, value)
            yield metric


def _items_by_level(plan: Plan, num_layers: int) -> dict[tuple[str, ...], float]:
    """Numbers of items by kind (as an item's name ends) and level; common levels also if 0.

    The cache of a removed attention block counts as removed.
    """
    kinds = (*BLOCK_KINDS, "cache", EMBEDDINGS)
    counts: Tally[tuple[str, ...]] = Tally(
        {(kind, level): 0 for kind in kinds for level in WEIGHT_LEVELS}
    )
    caches = {cache_name(index // 2) for index in plan.removed if index % 2 == 0}
    levels = plan.levels | dict.fromkeys(caches, "removed")
    for item in item_names(num_layers):
        kind = "cache" if is_cache(item) else item.rpartition(".")[2]
        counts[kind, levels.get(item, "native")] += 1
    return dict(sorted(counts.items()))
