"""Keeps a live model within memory that moves: asks for masks, guards them, applies them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rap_env.errors import InfeasibleBudgetError, InvalidRequestError
from rap_env.runtime.batch_shape import EMPTY_BATCH, BatchShape
from rap_env.runtime.decisions import Decision, DecisionLog
from rap_env.runtime.mask_choice import MaskChooser
from rap_env.runtime.mask_controller import MaskController, MaskSwitcher
from rap_env.runtime.memory_estimator import MemoryEstimator
from rap_env.runtime.memory_meter import Meter, ProcessMeter
from rap_env.runtime.memory_monitor import MemoryMonitor, SafetyMargin
from rap_env.runtime.memory_source import MemorySource, open_memory

if TYPE_CHECKING:
    from rap_env.llm.elastic import ElasticLLM
    from rap_env.llm.sites import HeldBytes
    from rap_env.policy import MaskPolicy


class RuntimeController:
    """Holds measured bytes within a budget that moves, by changing a live model's mask.

    The policy is asked when a request arrives, when the budget falls below what is needed, and when
    there is room again. Its mask is taken only if what it needs, by the memory arithmetic, and what
    was learned from the meter (`rap_env.runtime.memory_monitor`) fit together; else the guard
    removes more blocks in its own order until they do.

    **Going down** is immediate: `check` before each step. **Going up** waits while anything runs:
    a mask that needs more is applied only after it would have fitted for `hold_s` without a break,
    with `hysteresis_share` of the budget to spare. A budget that jitters around a threshold causes
    one switch, not many. A request that finds nothing running gets its mask at once (`admit`).

    One thread calls it, the one that runs the model; counters may be read from any.

    Args:
        llm: The live model. Set its residency first: with ``"resident"``, removing an FFN block
            frees nothing, and the guard knows that.
        policy: Chooses masks.
        memory: Says the budget; or what `open_memory` takes.
        meter: Measures what is used; by default that of the process or the device.
        guard_order: Indices of blocks in the order in which the guard removes them. By
            default the policy's `order` if it has one, else those that free most bytes first.
            An empty one means no guard: the policy's mask fits or nothing does.
        margin_share: Share of the dense model's weights to leave free in any case, before the
            meter has taught better.
        hysteresis_share: Share of the budget to leave free when blocks are brought back.
        hold_s: Seconds for which there must have been room before they are.
        log: Where to log decisions.
        clock: Gives the time in seconds, for `hold_s` and the log.

    Attributes:
        overhead_s: Seconds spent here altogether, switching and measuring included.

    Raises:
        InvalidRequestError: A share or a time is out of its range.
        UnknownNameError: There is no such memory source, or no such block in the guard's order.
        MemorySourceError: The system does not tell what is free.
    """

    def __init__(
        self,
        llm: ElasticLLM,
        policy: MaskPolicy,
        memory: MemorySource | Callable[[], float] | int | str,
        *,
        meter: Meter | None = None,
        guard_order: Sequence[int] | None = None,
        margin_share: float = 0.0,
        hysteresis_share: float = 0.05,
        hold_s: float = 2.0,
        log: DecisionLog | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not 0 <= hysteresis_share < 1 or hold_s < 0 or margin_share < 0:
            raise InvalidRequestError(
                "hysteresis_share must be from 0 to below 1, hold_s and margin_share at least 0, "
                f"not {hysteresis_share}, {hold_s} and {margin_share}."
            )
        self.llm = llm
        self.estimator = MemoryEstimator(llm)
        self.mask_chooser = MaskChooser(policy, self.estimator, guard_order)
        facts = self.estimator.memory.facts
        weights = facts.base_bytes + sum(facts.block_param_bytes)
        self.monitor = MemoryMonitor(
            llm,
            open_memory(memory, device=llm.device),
            ProcessMeter(llm) if meter is None else meter,
            self.estimator,
            SafetyMargin(int(margin_share * weights)),
        )
        self.hold_s = hold_s
        self.overhead_s = 0.0
        self._switcher = MaskSwitcher(llm, self.monitor, log, clock)
        self._mask_controller = MaskController(
            llm,
            self.mask_chooser,
            self.estimator,
            self.monitor,
            self._switcher,
            hysteresis_share=hysteresis_share,
            hold_s=hold_s,
            clock=clock,
        )
        self._refused: tuple[BatchShape, int] | None = None  # fitted nothing, in this room

    @property
    def policy(self) -> MaskPolicy:
        """The policy that is asked."""
        return self.mask_chooser.policy

    @property
    def decisions(self) -> int:
        """How often the policy was asked."""
        return self._mask_controller.decisions

    @property
    def decision_s(self) -> float:
        """Seconds spent choosing, in total."""
        return self._mask_controller.decision_s

    @property
    def switches(self) -> int:
        """How often the mask changed."""
        return self._switcher.count

    @property
    def switch_s(self) -> float:
        """Seconds spent switching, in total."""
        return self._switcher.seconds

    @property
    def recent(self) -> Sequence[Decision]:
        """The last decisions, the newest at the end."""
        return self._switcher.recent

    @property
    def budget_bytes(self) -> int:
        """The budget when last asked."""
        return self.monitor.budget_bytes

    @property
    def used_bytes(self) -> int:
        """What was measured last."""
        return self.monitor.used_bytes

    @property
    def held(self) -> HeldBytes:
        """Bytes of the tensors that were held after the last step."""
        return self.monitor.held

    @property
    def margin(self) -> SafetyMargin:
        """What is kept free beyond what masks need."""
        return self.monitor.margin

    def admit(self, shape: BatchShape, beside: BatchShape = EMPTY_BATCH) -> bool:
        """Make a request fit that has arrived: choose and apply a mask for it.

        While others run, a mask that fits already stays. With nothing else running, when a switch
        costs no refill, the policy is asked for a mask that suits the request, and one that needs
        more than that of now is taken at once, if it fits with `hysteresis_share` to spare.

        Args:
            shape: All that will run with the request.
            beside: What runs without it.

        Returns:
            Whether a mask fits.
        """
        with self._timed():
            self.monitor.poll()
            room = self.monitor.room_bytes(shape, self._mask_controller.coming(shape))
            if self._refused and self._refused[0] == shape and room <= self._refused[1]:
                return False
            mask = self.llm.mask
            need = self.estimator.peak_bytes(mask, shape)
            if need > room:
                if not self._mask_controller.fit(shape, room, "arrival", running=bool(beside)):
                    self._refused = (shape, room)
                    return False
            elif mask and not beside:
                self._mask_controller.suit(need, shape)
            return True

    def expect(self, tokens: int, growth_tokens: int) -> None:
        """Say what the next pass through the model will do; `admit` and `check` count with it.

        Args:
            tokens: Tokens that it will run, of all sequences together; 0 if that is not known.
            growth_tokens: Tokens that caches will hold more afterwards, padding included.
        """
        self._mask_controller.next_pass = (tokens, growth_tokens)

    def check(self, shape: BatchShape) -> bool:
        """Before each step: give memory back that the budget does not allow, or take some again.

        Args:
            shape: All that runs.

        Returns:
            Whether it fits now. If not, no mask does: run less and call again.
        """
        with self._timed():
            self.monitor.poll()
            if not shape:
                self.monitor.rest()
            room = self.monitor.room_bytes(shape, self._mask_controller.coming(shape))
            mask = self.llm.mask
            need = self.estimator.peak_bytes(mask, shape)
            if need > room:
                fits = self._mask_controller.fit(shape, room, "budget_fell", running=bool(shape))
                if not fits and not shape:
                    self._mask_controller.empty()
                return fits
            if mask:
                self._mask_controller.restore(need, shape)
            return True

    def observe(self, shape: BatchShape, kind: str = "step") -> int:
        """After each step: learn from what the meter saw of it.

        Args:
            shape: The shape that was in memory, padding included.
            kind: What the step did; kinds are learned apart.

        Returns:
            Most bytes that were measured since the last step or switch.
        """
        with self._timed():
            if kind != "prefill":
                self._mask_controller.decoded()
            return self.monitor.observe(shape, kind)

    def could_fit(self, shape: BatchShape) -> bool:
        """Whether a shape can ever fit: by the largest budget seen, or the source's limit.

        From any thread.
        """
        most = self.monitor.limit_bytes() - self.margin.bytes
        return self.mask_chooser.least_bytes(shape, most) <= most

    def never_fits(self, shape: BatchShape) -> bool:
        """Whether a shape that nothing else runs beside can never fit, as far as is measured."""
        self.monitor.trim()
        kept = self.budget_bytes - self.monitor.exact_room_bytes(
            shape, self._mask_controller.coming(shape)
        )
        most = self.monitor.limit_bytes() - kept
        return self.mask_chooser.least_bytes(shape, most) > most

    def before_step(self, shape: BatchShape) -> Callable[[], None]:
        """For ``llm.generate(before_step=...)``: checks before each step of a lone batch.

        Args:
            shape: The batch at its final length. `admit` it first.

        Returns:
            A function that raises `InfeasibleBudgetError` when no mask fits any more.
        """

        def before() -> None:
            self.observe(shape)
            self.expect(shape.batch_size, shape.batch_size)
            if not self.check(shape):
                raise InfeasibleBudgetError(
                    f"No mask fits {self.budget_bytes:,} bytes for {shape.batch_size} x "
                    f"{shape.seq_len_tokens} tokens any more, with {self.margin.bytes:,} bytes "
                    "of margin: raise the budget or generate less."
                )

        return before

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.overhead_s += time.perf_counter() - started
