"""The systems of a replay, and what serves the requests with one of them in time."""

from __future__ import annotations

import math
import time
from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from experiments.config.study_settings import ReplayConfig
from experiments.studies.replay.workload import Budget, ReplayRequest
from rap_env.errors import InfeasibleBudgetError, QueueFullError
from rap_env.levels import CacheLevel
from rap_env.memory import MemoryModel
from rap_env.models.device import return_freed_memory
from rap_env.models.live.elastic import ElasticLLM
from rap_env.plan import Plan
from rap_env.policies.base import Policy
from rap_env.policies.loading import OrderPolicy, check_policy, load_policy
from rap_env.runtime.controller import RuntimeController
from rap_env.runtime.engine import Engine
from rap_env.runtime.memory_meter import Meter, TensorMeter, make_levels, process_meter
from rap_env.runtime.memory_monitor import GivenMemory
from rap_env.runtime.records import ControllerSettings, EngineSettings, EngineStats, StepRecord
from rap_env.runtime.request_handle import EndEvent, Event, RequestHandle

UNIFORM = "uniform_native_"
"""How the names of systems begin that have one level for all caches."""
ORDER = "rap-v0"
"""Policy in whose order those systems remove blocks where caches alone do not fit."""

_IDLE_S, _MIN_IDLE_S = 0.25, 1e-3  # at most and at least skipped between two turns
_STOPWATCHES = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Interval:
    """One engine step, or a time without a running request.

    Attributes:
        peak_bytes: Maximum of the measured bytes.
        budget_bytes: The budget at the start.
        kept_bytes: Bytes of kept sequences at the end.
    """

    time_s: float
    end_s: float
    peak_bytes: int
    budget_bytes: int
    kept_bytes: int = 0

    @property
    def over_bytes(self) -> int:
        """Measured bytes above the budget."""
        return max(0, self.peak_bytes - self.budget_bytes)


class ReplayClock:
    """Seconds of a replay: those of a stopwatch since the start, and skipped idle time."""

    def __init__(self, stopwatch: Callable[[], float]) -> None:
        self._stopwatch, self._zero_s = stopwatch, math.inf

    def __call__(self) -> float:
        """Seconds since the start, 0 before it."""
        return max(0.0, self._stopwatch() - self._zero_s)

    def start(self) -> None:
        """Start the clock."""
        self._zero_s = self._stopwatch()

    def jump_to(self, time_s: float) -> None:
        """Skip idle time up to `time_s`; the clock never goes back."""
        self._zero_s -= max(0.0, time_s - self())


class SystemRun:
    """One system that serves all requests of a replay.

    Attributes:
        handles: The handle in the engine of each request that has arrived, in order; None if
            it was rejected on arrival.
        intervals: Steps and idle times in order.
        controller: Keeps the system within the budget.
        horizon_s: Until when all systems are monitored.
    """

    controller: RuntimeController
    _engine: Engine
    _meter: Meter

    def __init__(
        self, settings: ReplayConfig, llm: ElasticLLM, load: Sequence[ReplayRequest], budget: Budget
    ) -> None:
        self.settings, self.llm, self.requests, self.budget = settings, llm, list(load), budget
        self.handles: list[RequestHandle | None] = []
        self.intervals: list[Interval] = []
        self.horizon_s = load[-1].time_s + settings.queue_timeout_s
        self._clock = ReplayClock(_STOPWATCHES[settings.timing])

    def serve(self, policy: Policy, **options: Any) -> EngineStats:
        """Serve all requests with a policy; return the engine's counters.

        Args:
            policy: The policy.
            **options: More settings of the `Engine`.
        """
        settings, llm = self.settings, self.llm
        llm.set_residency("offload")
        make_levels(llm, policy)
        return_freed_memory()
        self._meter = TensorMeter(llm) if settings.meter == "tensors" else process_meter(llm)
        most_bytes = max(self.budget.between(0.0, self.horizon_s))
        self.controller = RuntimeController(
            llm,
            policy,
            GivenMemory(lambda: self.budget.at(self._clock()), limit_bytes=most_bytes),
            ControllerSettings(
                guard_order=() if policy.name == "dense" else None,
                chunk_tokens=settings.prefill_chunk_tokens,
            ),
            meter=self._meter,
            clock=self._clock,
        )
        engine_settings = EngineSettings(
            max_batch_size=settings.max_batch_size,
            prefill_chunk_tokens=settings.prefill_chunk_tokens,
            queue_timeout_s=settings.queue_timeout_s,
            **options,
        )
        self._engine = Engine(self.controller, engine_settings)
        self._engine.observers.append(self._on_step)
        self._clock.start()
        try:
            while self._turn():
                pass
        finally:
            self._engine.close()
            llm.apply(Plan())
        return self._engine.stats()

    def _on_step(self, step: StepRecord) -> None:
        self.intervals.append(
            Interval(step.time_s, self._clock(), step.peak_bytes, step.budget_bytes, step.held.kept)
        )

    def _on_event(self, number: int, event: Event) -> None:
        """Add the request that follows when the answer to one has ended."""
        handle = self.handles[number]
        if handle is not None and isinstance(event, EndEvent) and event.reason == "length":
            following = self.requests[number].following(handle.token_ids, event.time_s)
            if following is not None:
                insort(self.requests, following, len(self.handles), key=lambda r: r.time_s)
                self.horizon_s = self.requests[-1].time_s

    def _turn(self) -> bool:
        """Submit what has arrived, run a turn, or skip idle time; False at the end."""
        for request in self.requests[len(self.handles) :]:
            if request.time_s > self._clock():
                break
            listener = partial(self._on_event, len(self.handles))
            try:
                handle = self._engine.submit(request.prompt_ids, request.params, listener)
                self.handles.append(handle)
            except (InfeasibleBudgetError, QueueFullError):
                self.handles.append(None)
        began_s = self._clock()
        if self._engine.step():
            return True
        now_s, change_s = self._clock(), self.budget.next_change(began_s)
        if change_s > now_s:  # else the turn may have read the budget before
            arrivals_s = [request.time_s for request in self.requests[len(self.handles) :][:1]]
            until_s = min(now_s + _IDLE_S, change_s, *arrivals_s)
            self._clock.jump_to(max(until_s, now_s + _MIN_IDLE_S))
            used_bytes, budget_bytes = self._meter.used_bytes(), self.budget.at(now_s)
            end_s, kept_bytes = self._clock(), self.llm.kept_bytes
            self.intervals.append(Interval(now_s, end_s, used_bytes, budget_bytes, kept_bytes))
        waiting = any(handle is not None and not handle.done for handle in self.handles)
        return waiting or now_s < self.horizon_s


def check_system(name: str) -> None:
    """Check that there is a system of a name, without a model.

    Raises:
        UnknownNameError: There is none.
        ArtifactError: It is a damaged file.
    """
    if name.startswith(UNIFORM):
        CacheLevel.of(name.removeprefix(UNIFORM))
    else:
        check_policy(name)


def system_policy(name: str, llm: ElasticLLM) -> Policy:
    """The policy of a system, as ``replay.systems`` names it.

    Raises:
        RapError: There is no such policy, or it is of another model.
    """
    memory = MemoryModel(llm)
    if not name.startswith(UNIFORM):
        return load_policy(name, memory)
    plan = Plan.uniform(memory.facts.num_layers, caches=name.removeprefix(UNIFORM))
    return OrderPolicy(memory, load_policy(ORDER, memory).order or (), [plan])
