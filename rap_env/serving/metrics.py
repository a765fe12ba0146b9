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
from rap_env.plan import EMBEDDINGS, KINDS, Plan, cache_name, is_cache, item_names
from rap_env.runtime.memory_meter import ResidentMeter
from rap_env.serving.settings import ServerSettings
from rap_env.version import __version__

if TYPE_CHECKING:
    from rap_env.runtime.engine import Engine

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PER_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_REQUEST_S = (*_PER_TOKEN_S[3:], 30, 60, 120, 300, 600)
_TOKENS = tuple(2**n for n in range(16))
_OUTCOMES = ("served", "refused", "cancelled", "failed")


class ServingMetrics:
    """Counters and histograms of the server; each scrape also reads the engine's state.

    Histograms count each answer that the engine accepted into its queue, however it ended. Requests
    are counted by endpoint and outcome: ``ok``, ``disconnected``, or the code of the error.
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
        self.refused_connections = Counter(
            "rap_connections_refused",
            "Connections above the limit that got an error response.",
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
        self.per_token_s = histogram(
            "time_per_output_token_seconds",
            "Mean of an answer's tokens after the first.",
            _PER_TOKEN_S,
        )
        self.answer_s = histogram(
            "answer_duration_seconds",
            "From a request's arrival to the end of its answer.",
            _REQUEST_S,
        )
        self.prompt_tokens = histogram("prompt_length_tokens", "Tokens of a prompt.", _TOKENS)
        self.answer_tokens = histogram(
            "answer_length_tokens", "Tokens of an answer.", (0, *_TOKENS)
        )  # fmt: skip
        registry.register(_EngineState(engine, settings))
        ProcessCollector(registry=registry)

    def render(self) -> bytes:
        """Return the metrics in the Prometheus text format."""
        return generate_latest(self._registry)


_Values = dict[str, tuple[str, float | Mapping[str, float]]]
"""Metrics by name and labels: what each is, and its value, or one for each label.

Several labels, and values of them, are separated by a space.
"""


def _families(
    family: type[GaugeMetricFamily] | type[CounterMetricFamily], metrics: _Values
) -> Iterable[Metric]:
    for name, (text, values) in metrics.items():
        name, _, labels = name.removesuffix("]").partition("[")
        metric = family(f"rap_{name}", text, labels=labels.split())
        for label, value in values.items() if isinstance(values, Mapping) else [("", values)]:
            metric.add_metric(label.split(), value)
        yield metric


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
        whole, budget_bytes = monitor.source.process_bytes, max(0, monitor.budget_bytes)
        names = {"model": self._settings.served_name, "policy": chooser.policy.name}
        yield InfoMetricFamily("rap_build", "What serves.", {"version": __version__, **names})
        floor, meter = chooser.max_delta_nll, monitor.meter
        gauges: _Values = {
            "items[kind level]": (
                "Items of the model by kind and level.",
                _items_by_level(stats.plan, self._num_layers),
            ),
            "blocks_removed[kind]": (
                "Removed blocks by kind.",
                {kind: stats.plan.count_removed(kind) for kind in KINDS},
            ),
            "memory_held_bytes[part]": (
                "Bytes of tensors in memory.",
                {"weights": monitor.held.weights, "kv_cache": monitor.held.kv_cache},
            ),
            "memory_limit_bytes[of]": (
                "The memory limit: of the whole process, or of the model.",
                {"model": budget_bytes} if whole is None else {"process": whole},
            ),
            "memory_used_bytes": ("Measured bytes that the model takes.", monitor.used_bytes),
            "memory_budget_bytes": ("Bytes that the model may take.", budget_bytes),
            "memory_margin_bytes": (
                "Bytes of the budget that stay free for what is not predicted.",
                monitor.margin.bytes,
            ),
            "weights_unreadable": (
                "Whether the weights of a higher plan cannot be read (1), so that it waits.",
                bool(switcher.unreadable),
            ),
            "ready": (
                "Whether requests can be served (1), as /readyz reports, or not (0).",
                self._engine.unready_reason() is None,
            ),
            "queue_length": ("Answers that wait.", stats.queued),
            "stalled_seconds": (
                "Time for which answers have waited while none was generated.",
                stats.stalled_s,
            ),
            "max_delta_nll": (
                "Quality floor now, in nats per token; NaN without one.",
                math.nan if floor is None else floor,
            ),
            "running": ("Answers that are being generated.", stats.running),
            "lowered_rows": (
                "Those of them whose caches are below the plan's levels.",
                stats.lowered_rows,
            ),
        }
        if isinstance(meter, ResidentMeter):
            other = "Resident bytes of everything but the model."
            gauges["memory_other_bytes"] = other, meter.baseline_bytes
        yield from _families(GaugeMetricFamily, gauges)
        counters: _Values = {
            "answers[outcome]": (
                "Answers by how they ended in the engine; a stop string cancels what would follow.",
                {name: getattr(stats, name) for name in _OUTCOMES},
            ),
            "tokens[part]": (
                "Tokens by where they are.",
                {
                    "prompt": stats.prompt_tokens,
                    "repeated": stats.repeated_tokens,
                    "refilled": stats.refilled_tokens,
                    "generated": stats.tokens,
                },
            ),
            "preemptions": ("Answers put back into the queue.", stats.preemptions),
            "interruptions": (
                "Prefill chunks ended early because the budget fell.",
                stats.interruptions,
            ),
            "plan_switches": ("Changes of the plan.", switcher.switches),
            "plan_decisions": ("Times that a plan was chosen.", chooser.decisions),
            "decisions_lost": (
                "Changes of the plan that the log of decisions lacks.",
                switcher.lost_decisions,
            ),
            "controller_overhead_seconds": (
                "Time spent on choosing and switching plans.",
                stats.overhead_s,
            ),
            "busy_seconds": ("Time spent in steps of the engine.", stats.busy_s),
        }
        yield from _families(CounterMetricFamily, counters)


def _items_by_level(plan: Plan, num_layers: int) -> dict[str, float]:
    """Numbers of items by kind (as an item's name ends) and level; common levels also if 0.

    The cache of a removed attention block counts as removed.
    """
    kinds = (*KINDS, "cache", EMBEDDINGS)
    counts = Tally({f"{kind} {level}": 0 for kind in kinds for level in WEIGHT_LEVELS})
    caches = {cache_name(index // 2) for index in plan.removed if index % 2 == 0}
    levels = plan.levels | dict.fromkeys(caches, "removed")
    for item in item_names(num_layers):
        kind = "cache" if is_cache(item) else item.rpartition(".")[2]
        counts[f"{kind} {levels.get(item, 'native')}"] += 1
    return dict(sorted(counts.items()))
