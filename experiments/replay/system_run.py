"""Runs the systems of a replay: submits the requests to an engine in time, records its steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from experiments.config.replay_settings import ReplayConfig
from experiments.replay.budgets import Budget
from experiments.replay.workload import ReplayRequest, Workload
from rap_env.errors import InfeasibleBudgetError, QueueFullError
from rap_env.models.device import return_freed_memory
from rap_env.models.progress import progress_bar
from rap_env.plan import Plan
from rap_env.policies.base import Policy
from rap_env.runtime.controller import RuntimeController
from rap_env.runtime.engine import Engine
from rap_env.runtime.memory_meter import Meter, TensorMeter, make_levels, process_meter
from rap_env.runtime.memory_source import GivenMemory
from rap_env.runtime.records import DecisionLog, EngineStats, StepRecord
from rap_env.runtime.request_handle import RequestHandle
from rap_env.runtime.sampling import SamplingParams

if TYPE_CHECKING:
    from rap_env.models.live.elastic import ElasticLLM

NATIVE = Plan()

_SMOOTHING = 0.1  # weight of the newest step in the mean duration of decoding steps
_MIN_JUMP_S, _WAITING_JUMP_S = 1e-3, 0.25

_STOPWATCHES = {"wall": time.perf_counter, "cpu": time.process_time}
_REJECTED = {"queue_timeout": "timed_out", "infeasible": "refused", "below_floor": "refused"}


@dataclass(frozen=True)
class System:
    """One way to serve.

    Attributes:
        name: As in ``replay.systems``.
        guard_order: Blocks that may be removed if the policy's plan does not fit, in the order of
            removal; None leaves that to the controller, an empty tuple forbids it.
        start: The plan before the first request.
    """

    name: str
    policy: Policy
    guard_order: tuple[int, ...] | None
    start: Plan = NATIVE


@dataclass(frozen=True)
class Interval:
    """One engine step, a measurement of a policy, or a time without a running request.

    Attributes:
        peak_bytes: Maximum of the measured bytes.
        budget_bytes: The budget at the start.
    """

    time_s: float
    duration_s: float
    plan: Plan
    peak_bytes: int
    budget_bytes: int

    @property
    def end_s(self) -> float:
        """End of the interval."""
        return self.time_s + self.duration_s

    @property
    def over_bytes(self) -> int:
        """Measured bytes above the budget."""
        return max(0, self.peak_bytes - self.budget_bytes)


@dataclass
class RequestOutcome:
    """Outcome of one request.

    Attributes:
        handle: Its handle in the engine; None if it was rejected on arrival.
        outcome: ``served`` to its last token; ``refused``, because no plan can ever fit it;
            ``queue_full``; ``timed_out`` in the queue; ``failed``; ``unserved`` at the end.
    """

    request: ReplayRequest
    handle: RequestHandle | None = None
    outcome: str = "unserved"

    @property
    def ttft_s(self) -> float | None:
        """Time to first token, in seconds from the arrival; None without a token."""
        if self.handle is None or self.handle.first_token_s is None:
            return None
        return self.handle.first_token_s - self.request.time_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first, in seconds; None with fewer than two tokens."""
        handle = self.handle
        if handle is None or handle.first_token_s is None or handle.ended_s is None:
            return None
        more = len(handle.token_ids) - 1
        return (handle.ended_s - handle.first_token_s) / more if more > 0 else None

    def update(self) -> None:
        """Set the outcome from the handle, if the handle is done."""
        handle = self.handle
        if handle is None or not handle.done:
            return
        if handle.reason in ("length", "stop"):
            self.outcome = "served"
        elif handle.rejection is not None:
            self.outcome = _REJECTED[handle.rejection]
        elif handle.reason == "error":
            self.outcome = "failed"


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


@dataclass
class SystemRun:
    """One system that serves all requests of a workload.

    Attributes:
        log: File of the controller's decisions.
        intervals: Steps and idle times in order, once it ran.
        stats: The engine's counters at the end.
    """

    settings: ReplayConfig
    llm: ElasticLLM
    workload: Workload
    budget: Budget
    log: Path
    intervals: list[Interval] = field(default_factory=list)
    stats: EngineStats = field(init=False)
    controller: RuntimeController = field(init=False)
    _arrived: int = 0
    _step_s: float = 0.0
    _meter: Meter = field(init=False)
    _engine: Engine = field(init=False)

    def __post_init__(self) -> None:
        self.outcomes = [RequestOutcome(request) for request in self.workload.requests]
        self.clock = ReplayClock(_STOPWATCHES[self.settings.timing])
        self._horizon_s = self.workload.last_s + self.settings.queue_timeout_s

    def serve(self, system: System, *, progress: bool = False) -> None:
        """Serve all requests until no further event can occur."""
        decisions = DecisionLog(self.log)
        self._open(system, decisions)
        total = len(self.outcomes)
        bar = progress_bar(progress, total=total, desc=system.name, unit="request", leave=False)
        try:
            with bar:
                self._loop(bar)
        finally:
            self._engine.close()
            decisions.close()
            self.llm.apply(NATIVE)
        for outcome in self.outcomes:
            outcome.update()
        self.stats = self._engine.stats()

    @property
    def end_s(self) -> float:
        """End of the last interval."""
        return self.intervals[-1].end_s if self.intervals else 0.0

    @property
    def remaining_s(self) -> float:
        """Estimate of the seconds until the oldest requests, a full batch of them, finish."""
        running = [(o.request, h) for o in self.outcomes[: self._arrived] if (h := o.handle)]
        tokens = [r.new_tokens - len(h.token_ids) for r, h in running if not h.done]
        return max(tokens[: self.settings.max_batch_size], default=0) * self._step_s

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Record the time and memory of a policy that runs the model to choose a plan."""
        self._meter.peak_bytes()
        started = self.clock()
        yield
        seconds, peak = self.clock() - started, self._meter.peak_bytes()
        budget_bytes = self.budget.at(started)
        self.intervals.append(Interval(started, seconds, NATIVE, peak, budget_bytes))

    def _open(self, system: System, decisions: DecisionLog) -> None:
        """Bring model, meter and engine into the state at the start of a service."""
        settings, llm = self.settings, self.llm
        residency: Any = settings.residency  # plain strings in the settings
        llm.set_residency(residency)
        make_levels(llm, system.policy)
        llm.apply(system.start)
        return_freed_memory()
        self._meter = TensorMeter(llm) if settings.meter == "tensors" else process_meter(llm)
        most = self.budget.most(0.0, self._horizon_s)
        self.controller = RuntimeController(
            llm, system.policy,
            GivenMemory(lambda: self.budget.at(self.clock()), limit_bytes=most),
            meter=self._meter,
            guard_order=system.guard_order,
            hold_s=settings.hold_s,
            chunk_tokens=settings.prefill_chunk_tokens,
            log=decisions,
            clock=self.clock,
        )  # fmt: skip
        self._engine = Engine(
            llm, self.controller,
            max_batch_size=settings.max_batch_size,
            max_queue=settings.max_queue,
            prefill_chunk_tokens=settings.prefill_chunk_tokens,
            queue_timeout_s=settings.queue_timeout_s,
            clock=self.clock,
        )  # fmt: skip
        self._engine.warm_up()  # as `Engine.start` does; not counted in the time of the replay
        self._engine.observers.append(self._on_step)

    def _loop(self, bar: tqdm[Any]) -> None:
        while True:
            self._submit()
            started = self.clock()
            self.clock.resume()
            worked = self._engine.step()
            self.clock.stop()
            ended = sum(o.handle is None or o.handle.done for o in self.outcomes[: self._arrived])
            bar.update(ended - bar.n)
            if not worked and not self._skip_idle_time(started):
                return

    def _submit(self) -> None:
        """Submit the requests that have arrived by now."""
        for outcome in self.outcomes[self._arrived :]:
            request = outcome.request
            if request.time_s > self.clock():
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
        now = self.clock()
        if self.budget.next_change(since_s, now) is not None:
            return True
        events = [outcome.request.time_s for outcome in self.outcomes[self._arrived :][:1]]
        waiting = [o for o in self.outcomes[: self._arrived] if o.handle and not o.handle.done]
        if waiting:
            timeout = waiting[0].request.time_s + self.settings.queue_timeout_s
            events.append(max(timeout, now + _WAITING_JUMP_S))
        if now < self._horizon_s:  # all systems are monitored equally long
            events.append(self._horizon_s)
        if not events:
            return False
        change = self.budget.next_change(now, min(events))
        until = max(min(events) if change is None else change, now + _MIN_JUMP_S)
        self.clock.jump_to(until)
        used, budget_bytes = self._meter.used_bytes(), self.budget.at(now)
        self.intervals.append(Interval(now, until - now, self.llm.plan, used, budget_bytes))
        return True

    def _on_step(self, record: StepRecord) -> None:
        seconds = self.clock() - record.time_s
        if record.kind == "decode":
            weight = _SMOOTHING if self._step_s else 1.0
            self._step_s += weight * (seconds - self._step_s)
        self.intervals.append(
            Interval(record.time_s, seconds, record.plan, record.peak_bytes, record.budget_bytes)
        )
