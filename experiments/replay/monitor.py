"""The runtime's controller, watched by a replay."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rap_env.runtime.batch_shape import EMPTY_BATCH, BatchShape
from rap_env.runtime.controller import RuntimeController
from rap_env.runtime.memory_meter import Meter


class WatchedController(RuntimeController):
    """Notes who was turned away, and holds each step to the budget that it began with.

    What the process held before the budget fell, and gave back when it did, is no peak of the step
    that follows.

    Args:
        *args: As for `RuntimeController`.
        meter: Measures what is used.
        **settings: As for `RuntimeController`.

    Attributes:
        turned_away: Whether the last request that asked for room got none.
    """

    def __init__(self, *args: Any, meter: Meter, **settings: Any) -> None:
        self.turned_away = False
        self._own_meter = meter
        super().__init__(*args, meter=meter, **settings)

    def admit(self, demand: BatchShape, beside: BatchShape = EMPTY_BATCH) -> bool:
        """As `RuntimeController.admit`."""
        with self._new_peak_if_it_fell():
            admitted = super().admit(demand, beside)
        self.turned_away = not admitted
        return admitted

    def check(self, demand: BatchShape) -> bool:
        """As `RuntimeController.check`."""
        with self._new_peak_if_it_fell():
            return super().check(demand)

    @contextmanager
    def _new_peak_if_it_fell(self) -> Iterator[None]:
        before = self.budget_bytes
        yield
        if self.budget_bytes < before:
            self._own_meter.peak_bytes()
