"""Prometheus metrics: memory, budget, plan, queue, requests and latencies."""

from __future__ import annotations

import math
from collections import Counter as Tally
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
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
from rap_env.runtime.memory_meter import ResidentMeter
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


def _family(
    kind: type[GaugeMetricFamily] | type[CounterMetricFamily],
    name: str,
    text: str,
    values: float | Mapping[str, float],
) -> Metric:
    """A metric, or one for each label: `name` ends in ``[labels]`` then.

    Several labels, and values of them, are separated by a space.
    """
    name, _, labels = name.removesuffix("]").partition("[")
    metric = kind(f"rap_{name}", text, labels=labels.split())
    for label, value in values.items() if isinstance(values, Mapping) else [("", values)]:
        metric.add_metric(label.split(), value)
    return metric


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
        chooser, switcher, monitor = controller.chooser, controller.switcher, controller.monitor
        yield InfoMetricFamily(
            "rap_build",
            "What serves.",
            {
                "version": __version__,
                "model": self._settings.served_name,
                "policy": chooser.policy.name,
            },
        )
        gauge, counter = partial(_family, GaugeMetricFamily), partial(_family, CounterMetricFamily)

        # The plan
        items = _items_by_level(stats.plan, self._num_layers)
        yield gauge("items[kind level]", "Items of the model by kind and level.", items)
        removed: dict[str, float] = {kind: stats.plan.count_removed(kind) for kind in BLOCK_KINDS}
        yield gauge("blocks_removed[kind]", "Removed blocks by kind.", removed)
        floor = math.nan if chooser.max_delta_nll is None else chooser.max_delta_nll
        text = "Quality floor now, in nats per token; NaN without one."
        yield gauge("max_delta_nll", text, floor)
        text = "Whether the weights of a higher plan cannot be read (1), so that it waits."
        yield gauge("weights_unreadable", text, bool(switcher.unreadable))
        yield counter("plan_switches", "Changes of the plan.", switcher.switches)

        # Memory
        held = {"weights": monitor.held.weights, "kv_cache": monitor.held.kv_cache}
        held["kept"] = stats.kept_bytes
        yield gauge("memory_held_bytes[part]", "Bytes of tensors in memory.", held)
        whole, budget_bytes = monitor.source.process_bytes, max(0, monitor.budget_bytes)
        limit = {"model": budget_bytes} if whole is None else {"process": whole}
        text = "The memory limit: of the whole process, or of the model."
        yield gauge("memory_limit_bytes[of]", text, limit)
        text = "Measured bytes that the model takes."
        yield gauge("memory_used_bytes", text, monitor.used_bytes)
        yield gauge("memory_budget_bytes", "Bytes that the model may take.", budget_bytes)
        text = "Bytes of the budget that stay free for what is not predicted."
        yield gauge("memory_margin_bytes", text, monitor.margin.bytes)
        if isinstance(monitor.meter, ResidentMeter):
            text = "Resident bytes of everything but the model."
            yield gauge("memory_other_bytes", text, monitor.meter.baseline_bytes)

        text = "Sequences that are kept for later requests; their bytes are the part kept."
        yield gauge("kept_sequences", text, stats.kept_sequences)
        text = "Bytes of the files in which sequences are kept (keep_file_bytes)."
        yield gauge("kept_file_bytes", text, stats.kept_file_bytes)

        # Answers
        text = "Whether requests can be served (1), as /readyz reports, or not (0)."
        yield gauge("ready", text, self._engine.unready_reason() is None)
        yield gauge("queue_length", "Answers that wait.", stats.queued)
        text = "Time for which answers have waited while none was generated."
        yield gauge("stalled_seconds", text, stats.stalled_s)
        yield gauge("running", "Answers that are being generated.", stats.running)
        tokens = {
            "prompt": stats.prompt_tokens,
            "repeated": stats.repeated_tokens,
            "kept": stats.kept_tokens,
            "refilled": stats.refilled_tokens,
            "generated": stats.tokens,
        }
        yield counter("tokens[part]", "Tokens by where they are.", tokens)
        yield counter("preemptions", "Answers put back into the queue.", stats.preemptions)
        text = "Time spent on choosing and switching plans."
        yield counter("controller_overhead_seconds", text, stats.overhead_s)
        yield counter("busy_seconds", "Time spent in steps of the engine.", stats.busy_s)


def _items_by_level(plan: Plan, num_layers: int) -> dict[str, float]:
    """Numbers of items by kind (as an item's name ends) and level; common levels also if 0.

    The cache of a removed attention block counts as removed.
    """
    kinds = (*BLOCK_KINDS, "cache", EMBEDDINGS)
    counts = Tally({f"{kind} {level}": 0 for kind in kinds for level in WEIGHT_LEVELS})
    caches = {cache_name(index // 2) for index in plan.removed if index % 2 == 0}
    levels = plan.levels | dict.fromkeys(caches, "removed")
    for item in item_names(num_layers):
        kind = "cache" if is_cache(item) else item.rpartition(".")[2]
        counts[f"{kind} {levels.get(item, 'native')}"] += 1
    return dict(sorted(counts.items()))
