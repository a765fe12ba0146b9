"""Runs one system of a replay: submits the requests to an engine in time, and records the steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from experiments.config.serving import ReplayConfig
from experiments.replay.budgets import Budget
from experiments.replay.outcomes import RequestOutcome, SystemRun
from experiments.replay.systems import System, SystemFactory
from experiments.replay.time_series import IDLE, Interval, TimeSeries
from experiments.replay.workload import Workload
from rap_env.blocks import BlockMask
from rap_env.errors import InfeasibleBudgetError, QueueFullError
from rap_env.models.device import return_freed_memory
from rap_env.models.progress import progress_bar
from rap_env.plan import CompressionPlan
from rap_env.runtime.batch_shape import EMPTY_BATCH, BatchShape
from rap_env.runtime.controller import RuntimeController
from rap_env.runtime.decisions import DecisionLog
from rap_env.runtime.engine import Engine
from rap_env.runtime.memory_estimator import UNKNOWN_PASS, PassSize
from rap_env.runtime.memory_meter import Meter, TensorMeter, make_levels, process_meter
from rap_env.runtime.memory_source import GivenMemory
from rap_env.runtime.metrics import StepRecord
from rap_env.runtime.sampling import SamplingParams

if TYPE_CHECKING:
    from rap_env.models.live.elastic import ElasticLLM

MEASURING = "measure"
"""Kind of an interval in which a policy ran the model to choose a mask."""

_SMOOTHING = 0.1  # weight of the newest step in the mean duration of decoding steps
_MIN_JUMP_S, _WAITING_JUMP_S = 1e-3, 0.25


STOPWATCHES: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""Stopwatch of the engine's work, by the value of `ReplayConfig.timing`."""


class ReplayClock:
    """Seconds since the start of a replay: real seconds of work, plus skipped idle time.

    It runs only between `resume` and `stop`, so that the work of the replay itself (records,
    submitting requests) takes no time.
    """

    def __init__(self, stopwatch: Callable[[], float] = time.perf_counter) -> None:
        self._stopwatch = stopwatch
        self._passed_s = 0.0
        self._since_s: float | None = None

    def __call__(self) -> float:
        """Seconds since the start."""
        running = 0.0 if self._since_s is None else self._stopwatch() - self._since_s
        return self._passed_s + running

    def resume(self) -> None:
        """Start the clock: work begins."""
        if self._since_s is None:
            self._since_s = self._stopwatch()

    def stop(self) -> None:
        """Stop the clock: work has ended."""
        self._passed_s = self()
        self._since_s = None

    def jump_to(self, time_s: float) -> None:
        """Skip idle time up to `time_s`; the clock never goes back."""
        self._passed_s += max(0.0, time_s - self())


class MonitoredController(RuntimeController):
    """A controller that records rejections and resets the peak when the budget falls.

    Each step is measured against the budget at its start: memory that the process held before the
    budget fell, and released then, does not count as a peak of the following step.

    Attributes:
        admission_failed: Whether the last admission request was rejected.
    """

    admission_failed = False

    def admit(
        self,
        shape: BatchShape,
        running: BatchShape = EMPTY_BATCH,
        next_pass: PassSize = UNKNOWN_PASS,
    ) -> bool:
        """As `RuntimeController.admit`."""
        with self._reset_peak_if_budget_falls():
            admitted = super().admit(shape, running, next_pass)
        self.admission_failed = not admitted
        return admitted

    def check(self, shape: BatchShape, next_pass: PassSize = UNKNOWN_PASS) -> bool:
        """As `RuntimeController.check`."""
        with self._reset_peak_if_budget_falls():
            return super().check(shape, next_pass)

    @contextmanager
    def _reset_peak_if_budget_falls(self) -> Iterator[None]:
        before = self.monitor.budget_bytes
        yield
        if self.monitor.budget_bytes < before:
            self.monitor.meter.peak_bytes()


def horizon_s(settings: ReplayConfig, workload: Workload) -> float:
    """Time until which every system is monitored: when the last request would stop waiting."""
    return workload.last_s + settings.queue_timeout_s


class ReplayHarness:
    """Runs one system over all requests of a workload."""

    def __init__(
        self, settings: ReplayConfig, llm: ElasticLLM, workload: Workload, budget: Budget, log: Path
    ) -> None:
        self._settings = settings
        self._llm = llm
        self._budget = budget
        self._log = log
        self._horizon_s = horizon_s(settings, workload)
        self._clock = ReplayClock(STOPWATCHES[settings.timing])
        self._outcomes = [RequestOutcome(request) for request in workload.requests]
        self._intervals: list[Interval] = []
        self._arrived = 0
        self._step_s = self._busy_s = 0.0
        self._meter: Meter
        self._decisions: DecisionLog
        self._controller: MonitoredController
        self._engine: Engine

    def run(self, name: str, factory: SystemFactory, *, progress: bool = False) -> SystemRun:
        """Serve all requests until no further event can occur."""
        system = factory.make(name, self)
        self._open(system)
        bar = progress_bar(
            progress, total=len(self._outcomes), desc=name, unit="request", leave=False
        )
        try:
            with bar:
                self._loop(bar)
        finally:
            self._engine.close()
            self._decisions.close()
            self._llm.apply(BlockMask())
        for outcome in self._outcomes:
            outcome.update()
        return SystemRun(
            system, tuple(self._outcomes), TimeSeries(tuple(self._intervals)), self._controller,
            self._engine.stats(), self._busy_s,
        )  # fmt: skip

    def time_s(self) -> float:
        """Current time of the replay."""
        return self._clock()

    def remaining_s(self) -> float:
        """Estimate of the seconds until the oldest requests, a full batch of them, finish."""
        open_ = [h for h in self._outcomes[: self._arrived] if h.handle and not h.handle.done]
        tokens = [
            h.request.new_tokens - len(h.handle.token_ids)
            for h in open_[: self._settings.max_batch_size]
            if h.handle is not None
        ]
        return max(tokens, default=0) * self._step_s

    def margin_bytes(self) -> int:
        """Bytes that the controller keeps free below the budget."""
        return self._controller.monitor.margin.bytes

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Record the time and memory of a policy that runs the model to choose a mask."""
        self._meter.peak_bytes()
        started = self._clock()
        yield
        seconds, peak = self._clock() - started, self._meter.peak_bytes()
        budget_bytes = self._budget.at(started)
        self._intervals.append(
            Interval(started, seconds, MEASURING, 0, 0, CompressionPlan(), peak, budget_bytes)
        )

    def _open(self, system: System) -> None:
        """Bring model, meter and engine into the state at the start of a service."""
        settings, llm = self._settings, self._llm
        residency: Any = settings.residency  # plain strings in the settings
        restore: Any = settings.restore
        llm.set_residency(residency)
        make_levels(llm, system.policy)
        llm.apply(system.start)
        return_freed_memory()
        self._meter = (
            TensorMeter(llm) if settings.meter == "tensors" else process_meter(llm, reset_mark=True)
        )
        most = self._budget.most(0.0, self._horizon_s)
        memory = GivenMemory(lambda: self._budget.at(self._clock()), limit_bytes=most)
        self._decisions = DecisionLog(self._log)
        self._controller = MonitoredController(
            llm, system.policy, memory,
            meter=self._meter,
            guard_order=system.guard_order,
            margin_share=settings.margin_share,
            hysteresis_share=settings.hysteresis_share,
            hold_s=settings.hold_s,
            chunk_tokens=settings.prefill_chunk_tokens,
            log=self._decisions,
            clock=self._clock,
        )  # fmt: skip
        self._engine = Engine(
            llm, self._controller,
            max_batch_size=settings.max_batch_size,
            max_queue=settings.max_queue,
            prefill_chunk_tokens=settings.prefill_chunk_tokens,
            restore=restore,
            queue_timeout_s=settings.queue_timeout_s,
            clock=self._clock,
        )  # fmt: skip
        self._engine.warm_up()  # as `Engine.start` does; not counted in the time of the replay
        self._engine.observers.append(self._on_step)

    def _loop(self, bar: tqdm[Any]) -> None:
        while True:
            self._submit()
            self._controller.admission_failed = False
            started = self._clock()
            self._clock.resume()
            worked = self._engine.step()
            self._clock.stop()
            self._busy_s += (self._clock() - started) * worked
            self._mark_waiting()
            bar.update(sum(h.ended for h in self._outcomes[: self._arrived]) - bar.n)
            if not worked and not self._skip_idle_time(started):
                return

    def _submit(self) -> None:
        """Submit the requests that have arrived by now."""
        while self._arrived < len(self._outcomes):
            outcome = self._outcomes[self._arrived]
            request = outcome.request
            if request.time_s > self._clock():
                return
            self._arrived += 1
            params = SamplingParams(max_new_tokens=request.new_tokens)
            try:
                outcome.handle = self._engine.submit(request.prompt_ids, params)
            except InfeasibleBudgetError:
                outcome.outcome = "refused"
            except QueueFullError:
                outcome.outcome = "queue_full"

    def _skip_idle_time(self, since_s: float) -> bool:
        """Jump to the next event: an arrival, a change of the budget, or a queue timeout.

        Nothing is skipped if the budget changed in the turn that began at `since_s`, which may have
        read it before: the next turn sees it.

        Returns:
            False if no event is left.
        """
        now = self._clock()
        if self._budget.next_change(since_s, now) is not None:
            return True
        events = []
        if self._arrived < len(self._outcomes):
            events.append(self._outcomes[self._arrived].request.time_s)
        waiting = [h for h in self._outcomes[: self._arrived] if h.handle and not h.handle.done]
        if waiting:
            timeout = waiting[0].request.time_s + self._settings.queue_timeout_s
            events.append(max(timeout, now + _WAITING_JUMP_S))
        if now < self._horizon_s:  # all systems are monitored equally long
            events.append(self._horizon_s)
        if not events:
            return False
        change = self._budget.next_change(now, min(events))
        until = max(min(events) if change is None else change, now + _MIN_JUMP_S)
        self._clock.jump_to(until)
        used = self._meter.used_bytes()
        budget_bytes = self._budget.at(now)
        plan = self._llm.plan
        self._intervals.append(Interval(now, until - now, IDLE, 0, 0, plan, used, budget_bytes))
        return True

    def _mark_waiting(self) -> None:
        """Mark the requests that stay in the queue because this step could not admit them."""
        stats = self._engine.stats()
        if not self._controller.admission_failed and stats.running < self._settings.max_batch_size:
            return
        queued = stats.queued
        for outcome in reversed(self._outcomes[: self._arrived]):
            if queued <= 0:
                return
            handle = outcome.handle
            if handle is not None and not handle.done and handle.first_token_s is None:
                outcome.waited = True
                queued -= 1

    def _on_step(self, record: StepRecord) -> None:
        seconds = self._clock() - record.time_s
        if record.kind == "decode":
            weight = _SMOOTHING if self._step_s else 1.0
            self._step_s += weight * (seconds - self._step_s)
        self._intervals.append(
            Interval(
                record.time_s, seconds, record.kind, record.rows, record.length,
                record.plan, record.peak_bytes, record.budget_bytes,
            )
        )  # fmt: skip
