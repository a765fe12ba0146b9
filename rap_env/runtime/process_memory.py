"""The budget that a limit on the resident memory of the whole process leaves for the model."""

from __future__ import annotations

from collections.abc import Callable

from rap_env.runtime.memory_meter import ResidentMeter

HEADROOM_BYTES = 8 * 2**20
"""Bytes below the limit that stay free: for request bodies, texts and responses."""


class ProcessMemory:
    """What is left of a limit on the process, next to all that is not the model.

    Everything else that is resident (interpreter, libraries, tokenizer, server, freed memory that
    the C library keeps) is the meter's baseline. It is measured again whenever the runtime comes to
    rest; between these times its growth counts as used.

    Args:
        limit: Most bytes that may be resident, or a function that returns them.
        meter: Measures the process.
    """

    name = "process"

    def __init__(self, limit: Callable[[], int] | int, meter: ResidentMeter) -> None:
        self._read: Callable[[], int] = limit if callable(limit) else lambda: limit
        self._meter = meter

    @property
    def process_bytes(self) -> int:
        """Most bytes of the process that may be resident now."""
        return self._read()

    @property
    def other_bytes(self) -> int:
        """Resident bytes of all that is not the model, as last measured."""
        return self._meter.baseline_bytes

    def budget_bytes(self, used_bytes: int) -> int:
        """The limit, less all that is not the model and the headroom."""
        return max(0, self._read() - self.other_bytes - HEADROOM_BYTES)

    def measure_others(self, held_bytes: int) -> None:
        """Measure all that is not the model.

        Args:
            held_bytes: Bytes of the model's tensors.
        """
        self._meter.move_baseline(held_bytes)
