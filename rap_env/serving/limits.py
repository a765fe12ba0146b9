"""The memory limit of a running server, which a file changes."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rap_env.errors import ServingSettingsError
from rap_env.runtime.memory_estimator import BatchShape
from rap_env.runtime.memory_meter import ResidentMeter
from rap_env.runtime.memory_monitor import HEADROOM_BYTES
from rap_env.serving.settings import parse_bytes

if TYPE_CHECKING:
    from rap_env.runtime.controller import RuntimeController

log = logging.getLogger(__name__)

_SETTLE_S = 0.05  # for which a file must be unchanged: a half-written one changes again
_LONGEST_TEXT = 64
_MIB = 2**20


def file_state(path: str | Path) -> tuple[int, int, int] | None:
    """What changes with the content of a file; None if there is none."""
    try:
        status = Path(path).stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


class LiveLimit:
    """A limit that operators change while the server runs; call it to get the present bytes.

    As long as the file does not exist the limit stays as it is. A file that is incomplete,
    wrong or too small changes nothing, and one warning is logged.

    Args:
        name: The setting that it is: ``memory``, of the whole process, or ``model_memory``.
        limit_bytes: Value of the setting.
        file: A file with a size such as ``300MiB``, which is read whenever it changes.

    Raises:
        ServingSettingsError: The file exists and does not hold a size.
    """

    def __init__(self, name: str, limit_bytes: int, file: str | None = None) -> None:
        self.name = name
        self._check: Callable[[int], None] = lambda limit_bytes: None
        self._bytes = limit_bytes
        self._aside_bytes = 0
        self._file = None if file is None else Path(file)
        self._lock = threading.RLock()
        self._read_state = self._state()
        if self._read_state is not None:
            self.set(self._read())

    def __call__(self) -> int:
        """The bytes that are allowed now."""
        if self._file is not None:
            with self._lock:
                self._follow()
        return self._bytes - self._aside_bytes

    def set_aside(self, own_bytes: int) -> None:
        """Leave so many bytes of the limit to another process."""
        self._aside_bytes = own_bytes

    def attach(self, check: Callable[[int], None]) -> None:
        """Check the present value and all later ones against what is served.

        Args:
            check: Raises a `ServingSettingsError` for a number of bytes that is too small.
        """
        self._check = check
        check(self())

    @property
    def of_process(self) -> bool:
        """Whether it limits the whole process, not the model alone."""
        return self.name == "memory"

    def set(self, limit_bytes: int) -> None:
        """Change the limit; a `ServingSettingsError` if it is too small, and it stays as it was."""
        self._check(limit_bytes)
        with self._lock:
            if limit_bytes == self._bytes:
                return
            self._bytes = limit_bytes
            log.info("%s is now %s.", self.name, mebibytes(limit_bytes))

    def _follow(self) -> None:
        """Read the file if it has changed, once its own time says that it is no longer written."""
        state = self._state()
        if state == self._read_state:
            return
        if state is not None and abs(time.time() - state[2] / 1e9) < _SETTLE_S:
            return
        self._read_state = state
        try:
            self.set(self._read())
        except ServingSettingsError as error:
            log.warning("%s stays at %s: %s", self.name, mebibytes(self._bytes), error)

    def _state(self) -> tuple[int, int, int] | None:
        return None if self._file is None else file_state(self._file)

    def _read(self) -> int:
        assert self._file is not None
        try:
            with self._file.open("rb") as file:
                text = file.read(_LONGEST_TEXT + 1).decode("ascii", errors="replace")
        except OSError as error:
            raise ServingSettingsError(
                f"Cannot read memory_file {self._file}: {error.strerror}."
            ) from None
        if len(text) > _LONGEST_TEXT:
            text = f"{text[:_LONGEST_TEXT]}..."
        return parse_bytes(f"memory_file {self._file}", text)


def least_check(model: str, controller: RuntimeController) -> Callable[[int], None]:
    """What rejects a limit in which not even one token fits with the smallest plan."""
    one = BatchShape(1, 1)
    smallest = controller.chooser.smallest(one, 1)
    least = controller.estimator.memory.peak_bytes(smallest, one.request(1))
    meter = controller.monitor.meter
    of_process = controller.monitor.source.other_bytes is not None

    def check(limit_bytes: int) -> None:
        if not of_process or not isinstance(meter, ResidentMeter):
            if limit_bytes < least:
                raise ServingSettingsError(
                    f"model_memory must be at least {least:,} bytes for {model}, which its "
                    f"smallest plan needs for one token, not {limit_bytes:,}; give more."
                )
            return
        others = meter.baseline_bytes + HEADROOM_BYTES
        if limit_bytes < least + others:
            raise ServingSettingsError(
                f"memory must be at least {mebibytes(others + least)} for {model}: "
                f"{mebibytes(least)} for one token with its smallest plan and {mebibytes(others)} "
                f"for everything else in the process, not {mebibytes(limit_bytes)}; give more."
            )

    return check


def mebibytes(number: int) -> str:
    """A number of bytes, rounded up to whole MiB, as settings accept it."""
    return f"{-(-number // _MIB)}MiB"
