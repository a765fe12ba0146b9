"""Does what is decided: looks, asks `decide`, acts, measures, and asks again."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from rap_env.runtime.controller import RuntimeController
from rap_env.runtime.decision import (
    Action,
    Apply,
    Borrow,
    FreeKept,
    Preempt,
    RowAction,
    Snapshot,
    Wait,
    decide,
)
from rap_env.runtime.kept_sequences import KeptSequences
from rap_env.runtime.memory_estimator import BatchShape

if TYPE_CHECKING:
    from rap_env.models.live.elastic import ElasticLLM

_LOOK_S = 0.02  # between looks at the budget within a prefill chunk
_MOST_INTERRUPTIONS = 3  # of one chunk; with a budget that jumps, it would never end


class Executor:
    """Keeps a live model within its budget; only the thread that runs the model may call it.

    Args:
        controller: The parts with which it does that.
        kept: What is kept beside the batch.
    """

    def __init__(self, controller: RuntimeController, kept: KeptSequences) -> None:
        self.controller = controller
        self._llm: ElasticLLM = controller.llm
        self._kept = kept
        self._chooser = controller.chooser
        self._monitor = controller.monitor
        self._headroom = controller.headroom
        # Bytes that were available when no plan fitted a batch and a quality floor.
        self._rejected: dict[tuple[BatchShape, float], int] = {}
        self._next_look_s = 0.0
        self._interruptions = 0  # of the chunk that is next

    def act(self, asked: Snapshot) -> RowAction | None:
        """Act until the next pass may run, or until it is the turn of rows.

        Args:
            asked: What is known of the batch; what is measured is filled in.

        Returns:
            What is to be done with rows; None if the pass may run.
        """
        with self.controller.timed():
            snapshot = self._begin(asked)
            while actions := decide(snapshot, self._chooser):
                for action in actions:
                    if not isinstance(action, Action):
                        return self._end(action, snapshot)
                    done = self._do(action, snapshot)
                    progress = snapshot.progress.after(action, failed=not done)
                    snapshot = replace(snapshot, progress=progress)
                snapshot = self._measured(snapshot)
            self._note_unraised(snapshot)
            return None

    def _begin(self, asked: Snapshot) -> Snapshot:
        """The first snapshot of several decisions that follow one another."""
        monitor = self._monitor
        monitor.poll()
        looks_at_rows = asked.joined is None
        if looks_at_rows and not asked.running:
            monitor.borrow(0)
            monitor.observe_idle()
        if looks_at_rows and self.controller.switcher.retry():
            self._rejected = {}
            self._headroom.forget_failure()
        floor = self._chooser.follow_queue(
            asked.waiting, self._llm.plan, asked.running, stalled=asked.stalled
        )
        snapshot = self._measured(
            replace(
                asked,
                floor=floor,
                rests=looks_at_rows and self._headroom.was_idle(asked.running),
                rejected_bytes=None if looks_at_rows else self._rejected.get((asked.shape, floor)),
            )
        )
        if looks_at_rows and snapshot.plan and snapshot.readable and not snapshot.rests:
            return replace(snapshot, lasting_bytes=self._lasting_bytes(snapshot))
        return snapshot

    def _measured(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot with what is measured now."""
        monitor = self._monitor
        return replace(
            snapshot,
            plan=self._llm.plan,
            budget_bytes=monitor.budget_bytes,
            reserve_bytes=monitor.usable_reserve_bytes,
            borrowed_bytes=monitor.borrowed_bytes,
            used_bytes=monitor.used_bytes,
            held_bytes=monitor.held.total,
            kept_bytes=self._llm.kept_bytes,
            margin_bytes=monitor.margin.bytes_for(prefills=snapshot.next_pass.prefills),
            spare_bytes=int(monitor.budget_bytes * self.controller.settings.spare_share),
            readable=not self.controller.switcher.unreadable,
        )

    def _lasting_bytes(self, snapshot: Snapshot) -> int | None:
        estimator, plan, shape = self.controller.estimator, snapshot.plan, snapshot.running
        need_bytes = snapshot.spare_bytes + snapshot.borrowed_bytes + snapshot.margin_bytes
        need_bytes += estimator.peak_bytes(plan, shape)
        least_bytes = estimator.least_raise_bytes(plan, shape)
        return self._headroom.lasting_bytes(shape, snapshot.budget_bytes - need_bytes, least_bytes)

    def _do(self, action: Action, snapshot: Snapshot) -> bool:
        """Do an action, so that memory is measured after it; whether that was all of it."""
        done = True
        if isinstance(action, Apply):
            self._headroom.reset()
            return self.controller.switcher.apply(action.plan, snapshot.shape, action.trigger)
        if isinstance(action, FreeKept):
            done = not self._kept.free(action.bytes, action.at_once)
        elif isinstance(action, Borrow):
            self._monitor.borrow(action.bytes)
        self._monitor.trim()
        return done

    def _end(self, action: RowAction, snapshot: Snapshot) -> RowAction:
        """Note what was too little for a batch."""
        tried = isinstance(action, Preempt)
        if isinstance(action, Wait) and (too_few_bytes := action.too_few_bytes) is not None:
            known_bytes = snapshot.rejected_bytes
            if known_bytes is None or too_few_bytes > known_bytes:
                self._rejected = {(snapshot.shape, snapshot.floor): too_few_bytes}
                tried = True
        if tried:
            self._headroom.reset()
        return action

    def _note_unraised(self, snapshot: Snapshot) -> None:
        """Note in how much headroom nothing better fitted."""
        if snapshot.lasting_bytes is not None and not snapshot.progress.exact:
            least_bytes = self.controller.estimator.least_raise_bytes(
                snapshot.plan, snapshot.running
            )
            self._headroom.note_failure(snapshot.running, snapshot.lasting_bytes + least_bytes)

    # Within a pass

    def new_chunk(self) -> None:
        """The next chunk is another one than the last, which may have been interrupted."""
        self._interruptions = 0

    def must_interrupt(self) -> bool:
        """Whether a chunk is to end: the budget fell below what is used without what is kept."""
        now = time.perf_counter()
        if now < self._next_look_s or self._interruptions >= _MOST_INTERRUPTIONS:
            return False
        self._next_look_s = now + _LOOK_S
        excess_bytes = self._monitor.excess_bytes()
        if excess_bytes and self._llm.kept_bytes:
            self._kept.free(excess_bytes)
            excess_bytes = self._monitor.excess_bytes()
        self._interruptions += excess_bytes > 0
        return excess_bytes > 0

    def forget_margin(self) -> None:
        """Expect no more than what is measured now, where requests wait and nothing runs."""
        with self.controller.timed():
            self._monitor.margin.forget()
            self._monitor.trim()
            self._rejected = {}
