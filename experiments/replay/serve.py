"""Serves one system: the arrivals of a replay, in time, on the engine itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from experiments.config import ReplayConfig
from experiments.replay.budgets import Budget
from experiments.replay.clock import STOPWATCHES, ReplayClock
from experiments.replay.energy import EnergyMeter
from experiments.replay.handled import Handled, Served
from experiments.replay.load import Load
from experiments.replay.monitor import WatchedController
from experiments.replay.systems import System, SystemMaker
from experiments.replay.time_series import IDLE, Moment, Trail
from rap_env.blocks import BlockMask
from rap_env.errors import InfeasibleBudgetError, QueueFullError
from rap_env.llm.device import return_freed_memory
from rap_env.runtime.decisions import DecisionLog
from rap_env.runtime.engine import Engine, StepRecord
from rap_env.runtime.memory_meter import Meter, ProcessMeter, TensorMeter
from rap_env.runtime.memory_source import GivenMemory
from rap_env.runtime.policies import StaticPolicy
from rap_env.runtime.sampling import SamplingParams

if TYPE_CHECKING:
    from rap_env.llm.elastic import ElasticLLM

MEASURING = "measure"
"""The kind of a moment in which a policy ran the model to choose."""

_SMOOTHED = 0.1  # of the newest step in the mean duration of decoding steps
_LEAST_JUMP_S, _PATIENT_JUMP_S = 1e-3, 0.25


def horizon_s(settings: ReplayConfig, load: Load) -> float:
    """Until when a system is watched at least: when the last request would give up waiting."""
    return load.last_s + settings.queue_timeout_s


class Server:
    """Runs one system over all arrivals of a load.

    Args:
        settings: Those of the replay.
        llm: The live model.
        load: What is asked.
        budget: The budget.
        log: Where the controller's decisions go.
    """

    def __init__(
        self, settings: ReplayConfig, llm: ElasticLLM, load: Load, budget: Budget, log: Path
    ) -> None:
        self._settings = settings
        self._llm = llm
        self._load = load
        self._budget = budget
        self._log = log
        self._horizon_s = horizon_s(settings, load)
        self._clock = ReplayClock(STOPWATCHES[settings.timing])
        self._handled = [Handled(asked) for asked in load.requests]
        self._moments: list[Moment] = []
        self._arrived = 0
        self._step_s = self._busy_s = 0.0
        self._meter: Meter
        self._decisions: DecisionLog
        self._controller: WatchedController
        self._engine: Engine

    def run(self, name: str, maker: SystemMaker, *, progress: bool = False) -> Served:
        """Serve all that is asked, until nothing can come any more.

        Args:
            name: Name of the system.
            maker: Makes it.
            progress: Whether to draw a progress bar.

        Raises:
            RapError: The system cannot be made.
        """
        system = maker.make(name, self)
        self._open(system)
        energy = EnergyMeter(devices=self._llm.device.type == "cuda")
        bar = tqdm(total=len(self._handled), desc=name, unit="request", leave=False,
                   dynamic_ncols=True, disable=None if progress else True)  # fmt: skip
        try:
            with bar:
                self._loop(bar)
        finally:
            self._engine.close()
            self._decisions.close()
            self._llm.apply(BlockMask())
        joules = energy.joules()
        for handled in self._handled:
            handled.note_end()
        return Served(
            system, tuple(self._handled), Trail(tuple(self._moments)), self._controller,
            self._engine.stats(), self._busy_s, joules,
        )  # fmt: skip

    def time_s(self) -> float:
        """The time of the replay."""
        return self._clock()

    def remaining_s(self) -> float:
        """Seconds that the oldest requests, as many as run at once, will still take."""
        open_ = [h for h in self._handled[: self._arrived] if h.handle and not h.handle.done]
        tokens = [
            h.asked.new_tokens - len(h.handle.token_ids)
            for h in open_[: self._settings.max_batch_size]
            if h.handle is not None
        ]
        return max(tokens, default=0) * self._step_s

    def margin_bytes(self) -> int:
        """Bytes that the controller keeps free below the budget."""
        return self._controller.margin.bytes

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Count what a policy takes that runs the model to choose."""
        self._meter.peak_bytes()
        began = self._clock()
        yield
        self._note(began, MEASURING, BlockMask(), self._meter.peak_bytes())

    def _open(self, system: System) -> None:
        """Everything as at the start of a service: the mask, the meter, the engine."""
        settings, llm = self._settings, self._llm
        residency: Any = settings.residency  # settings know their words as plain text
        restore: Any = settings.restore
        llm.set_residency(residency)
        llm.apply(system.policy.mask if isinstance(system.policy, StaticPolicy) else BlockMask())
        return_freed_memory()
        self._meter = TensorMeter(llm) if settings.meter == "tensors" else ProcessMeter(llm)
        most = self._budget.most(0.0, self._horizon_s)
        memory = GivenMemory(lambda: self._budget.at(self._clock()), limit_bytes=most)
        self._decisions = DecisionLog(self._log)
        self._controller = WatchedController(
            llm, system.policy, memory,
            meter=self._meter,
            guard_order=system.guard_order,
            margin_share=settings.margin_share,
            hysteresis_share=settings.hysteresis_share,
            hold_s=settings.hold_s,
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
        self._engine.warm_up()  # as `Engine.start` does; it takes none of the replay's time
        self._engine.observers.append(self._on_step)

    def _loop(self, bar: tqdm[Any]) -> None:
        while True:
            self._submit()
            self._controller.turned_away = False
            began = self._clock()
            self._clock.resume()
            worked = self._engine.step()
            self._clock.stop()
            self._busy_s += (self._clock() - began) * worked
            self._mark_waiting()
            bar.update(sum(h.ended for h in self._handled[: self._arrived]) - bar.n)
            if not worked and not self._skip_idle_time():
                return

    def _submit(self) -> None:
        """Hand over what has arrived by now."""
        while self._arrived < len(self._handled):
            handled = self._handled[self._arrived]
            if handled.asked.time_s > self._clock():
                return
            self._arrived += 1
            params = SamplingParams(max_new_tokens=handled.asked.new_tokens)
            try:
                handled.handle = self._engine.submit(handled.asked.prompt_ids, params)
            except InfeasibleBudgetError:
                handled.outcome = "refused"
            except QueueFullError:
                handled.outcome = "queue_full"

    def _skip_idle_time(self) -> bool:
        """Jump to whatever comes next: an arrival, a change of the budget, the end of a wait.

        Returns:
            False where nothing comes any more.
        """
        now = self._clock()
        coming = []
        if self._arrived < len(self._handled):
            coming.append(self._handled[self._arrived].asked.time_s)
        waiting = [h for h in self._handled[: self._arrived] if h.handle and not h.handle.done]
        if waiting:
            patience = waiting[0].asked.time_s + self._settings.queue_timeout_s
            coming.append(max(patience, now + _PATIENT_JUMP_S))
        if now < self._horizon_s:  # all systems are watched as long, also those soon done
            coming.append(self._horizon_s)
        if not coming:
            return False
        change = self._budget.next_change(now, min(coming))
        until = max(min(coming) if change is None else change, now + _LEAST_JUMP_S)
        self._clock.jump_to(until)
        used = self._meter.used_bytes()
        budget_bytes = self._budget.at(now)
        mask = self._llm.mask
        self._moments.append(Moment(now, until - now, IDLE, 0, 0, mask, used, budget_bytes))
        return True

    def _mark_waiting(self) -> None:
        """Note who is in the queue because nobody more could be taken in this turn."""
        stats = self._engine.stats()
        if not self._controller.turned_away and stats.running < self._settings.max_batch_size:
            return
        queued = stats.queued
        for handled in reversed(self._handled[: self._arrived]):
            if queued <= 0:
                return
            handle = handled.handle
            if handle is not None and not handle.done and handle.first_token_s is None:
                handled.waited = True
                queued -= 1

    def _on_step(self, record: StepRecord) -> None:
        seconds = self._clock() - record.time_s
        if record.kind == "decode":
            weight = _SMOOTHED if self._step_s else 1.0
            self._step_s += weight * (seconds - self._step_s)
        self._moments.append(
            Moment(
                record.time_s, seconds, record.kind, record.rows, record.length,
                record.mask, record.peak_bytes, record.budget_bytes,
            )
        )  # fmt: skip

    def _note(self, began: float, kind: str, mask: BlockMask, peak: int) -> None:
        seconds = self._clock() - began
        budget_bytes = self._budget.at(began)
        self._moments.append(Moment(began, seconds, kind, 0, 0, mask, peak, budget_bytes))
