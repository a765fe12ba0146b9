"""Whether batches can fit a budget that moves, and the messages that say why one does not."""

from __future__ import annotations

import logging

from rap_env.errors import InfeasibleBudgetError, QualityFloorError, counted
from rap_env.runtime.batch_shape import BatchShape, PassSize
from rap_env.runtime.memory_monitor import MemoryMonitor
from rap_env.runtime.plan_chooser import PlanChooser
from rap_env.runtime.plan_switcher import PlanSwitcher
from rap_env.runtime.request_handle import Rejection

log = logging.getLogger(__name__)

_MORE = "raise model_memory (or memory), or max_delta_nll"
_MIB = 2**20


class Feasibility:
    """Tells whether batches fit now, or ever; the part of `RuntimeController` that changes nothing.

    Attributes:
        monitor: Measures bytes.
        chooser: Chooses plans.
        switcher: Knows which plans can be applied.
        stall_reason: Why requests wait and nothing runs; empty while something does.
    """

    monitor: MemoryMonitor
    chooser: PlanChooser
    switcher: PlanSwitcher

    def __init__(self) -> None:
        self.stall_reason = ""
        self._waiting = 0

    def could_fit(self, shape: BatchShape) -> bool:
        """Whether a batch can ever fit: in the largest budget so far, or the source's limit.

        Any thread may call it.
        """
        return self.could_fit_in(shape, self.monitor.budget_limit_bytes())

    def could_fit_in(self, shape: BatchShape, budget_bytes: int) -> bool:
        """Whether a batch, with nothing else running, can fit in a budget; from any thread.

        The safety margin is left out: it is forgotten where it keeps requests from running.
        """
        # The present plan is tried first, which is faster than another one.
        present = self.switcher.present_fits(shape, budget_bytes)
        return present or self.chooser.could_fit(shape, budget_bytes)

    def nothing_fits(self) -> str:
        """Why not even a request of one token fits now; empty if it does. From any thread."""
        budget = self.monitor.budget_now_bytes()
        reserve = self.monitor.usable_reserve_bytes - self.monitor.borrowed_bytes
        if self.could_fit_in(BatchShape(1, 1), budget + reserve):
            return ""
        return (
            f"No plan{self.chooser.floor_clause} fits a request of one token into the budget of "
            f"{budget / _MIB:.1f} MiB; {_MORE}."
        )

    def misfit(self, shape: BatchShape, *, expected: bool) -> InfeasibleBudgetError:
        """The error that says why a batch does not fit with nothing else running.

        It is a `QualityFloorError` if plans fit, but none that is allowed. Any thread may call it.

        Args:
            shape: A batch that does not fit.
            expected: Whether it is the largest expected budget in which it does not, else the
                present one.
        """
        monitor, chooser = self.monitor, self.chooser
        budget = monitor.budget_limit_bytes() if expected else monitor.budget_bytes
        message = (
            f"{shape.seq_len_tokens} tokens do not fit the {'largest expected ' * expected}budget "
            f"of {budget:,} bytes under any plan{chooser.clause_for(shape)}"
            f"{self.switcher.unreadable.clause}"
        )
        rise = chooser.least_rise(shape, budget)
        remedy = "shorten the prompt or ask for fewer tokens"
        if not self.could_fit_in(BatchShape(1, 1), budget):
            remedy = f"not even one token fits: {_MORE}"
        if rise is None or chooser.could_fit(shape, budget):
            return InfeasibleBudgetError(f"{message}; {remedy}.")
        return QualityFloorError(f"{message}: the best plan that fits has {rise:.4g}; {remedy}.")

    def timeout_error(self, shape: BatchShape, timeout_s: float) -> tuple[str, Rejection]:
        """Why a request that has waited too long is rejected, and whether that is its floor."""
        message, clause = (
            f"The request waited longer than {timeout_s} s.",
            self.chooser.clause_for(shape),
        )
        if clause and not self.could_fit_in(shape, self.monitor.budget_bytes):
            error = self.misfit(shape, expected=False)
            floor = isinstance(error, QualityFloorError)
            return f"{message} {error}", "below_floor" if floor else "queue_timeout"
        return message + (f" Only plans{clause} are used." if clause else ""), "queue_timeout"

    def has_room(self, shape: BatchShape, next_pass: PassSize) -> bool:
        """Whether the present plan fits a batch as it is."""
        self.monitor.poll()
        estimate = self.switcher.pass_estimate(shape, next_pass)
        return self.switcher.present_fits(shape, self.monitor.available_bytes(shape, estimate))

    def note_stall(self, shortest: BatchShape) -> None:
        """After none of the requests that wait fitted, and nothing runs: log why, once.

        Args:
            shortest: The shape of the shortest of them.
        """
        if self.stall_reason:
            return
        monitor = self.monitor
        least = self.chooser.least_bytes(shortest)
        self.stall_reason = (
            f"{counted(self._waiting, 'request')} cannot run now: of the budget of "
            f"{monitor.budget_bytes / _MIB:.1f} MiB (and {monitor.usable_reserve_bytes / _MIB:.1f} "
            f"MiB of the reserve), {monitor.used_bytes / _MIB:.1f} MiB are used and "
            f"{monitor.margin.bytes / _MIB:.1f} MiB are a margin; the least plan"
            f"{self.chooser.floor_clause} takes {least / _MIB:.1f} MiB for the shortest of them."
        )
        log.warning("%s", self.stall_reason)
