"""Prometheus metrics: memory, budget, plan, queue, requests and latencies."""

from __future__ import annotations

import hashlib
from collections import Counter as Tally
from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from rap_env.blocks import KINDS
from rap_env.plan import CompressionPlan
from rap_env.runtime.memory_meter import ResidentMeter
from rap_env.runtime.process_memory import ProcessMemory
from rap_env.serving.settings import ServerSettings
from rap_env.version import __version__

if TYPE_CHECKING:
    from rap_env.runtime.engine import Engine
    from rap_env.runtime.memory_monitor import MemoryMonitor

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_PER_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)


class ServingMetrics:
    """Counters of the server; each scrape also reads the engine's state.

    Attributes:
        requests: Requests by endpoint and outcome: ``ok``, ``disconnected``, or the code of
            the error response.
        first_token_s: Seconds from arrival to first token.
        per_token_s: Mean seconds per token after the first, one value per answer.
    """

    def __init__(self, engine: Engine, settings: ServerSettings) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "rap_requests", "Requests by endpoint and outcome.", ["endpoint", "outcome"],
            registry=self._registry,
        )  # fmt: skip
        self.first_token_s = Histogram(
            "rap_time_to_first_token_seconds", "From a request's arrival to its first token.",
            buckets=_FIRST_TOKEN_S, registry=self._registry,
        )  # fmt: skip
        self.per_token_s = Histogram(
            "rap_time_per_output_token_seconds", "Mean of an answer's tokens after the first.",
            buckets=_PER_TOKEN_S, registry=self._registry,
        )  # fmt: skip
        self._registry.register(_EngineState(engine, settings))

    def render(self) -> bytes:
        """Return the metrics in the Prometheus text format."""
        return generate_latest(self._registry)


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
        stats, controller = self._engine.stats(), self._engine.controller
        chooser, switches = controller.chooser, controller.plans.switches
        names = {"model": self._settings.served_name, "policy": chooser.policy.name}
        yield InfoMetricFamily("rap_build", "What serves.", {"version": __version__, **names})
        removed = " ".join(stats.mask.names)
        digest = hashlib.sha256(removed.encode()).hexdigest()[:12]
        mask = {"removed": removed, "digest": digest}
        yield InfoMetricFamily("rap_mask", "The removed blocks.", mask)
        whole = {"plan": stats.plan.to_json(), "digest": stats.plan.digest}
        yield InfoMetricFamily("rap_plan", "Items below their native level.", whole)
        lowered = GaugeMetricFamily(
            "rap_items_lowered", "Items below their native level, removed ones included.",
            labels=["kind", "level"],
        )  # fmt: skip
        for labels, count in _lowered_items(stats.plan).items():
            lowered.add_metric(labels, count)
        yield lowered

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
            (gauge, "queue_length", "Answers that wait.", stats.queued),
            (gauge, "running", "Answers that are being generated.", stats.running),
            (counter, "preemptions", "Answers put back into the queue.", stats.preemptions),
            (counter, "mask_switches", "Changes of the plan.", switches),
            (counter, "mask_decisions", "Times that a plan was chosen.", chooser.decisions),
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


def _lowered_items(plan: CompressionPlan) -> Tally[tuple[str, str]]:
    """Numbers of items below their native level, by kind (as the item's name ends) and level."""
    return Tally((item.rpartition(".")[2], level) for item, level in plan.levels.items())
