"""The memory limit of a server: set, checked before and after the model is loaded, and changed."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rap_env.errors import ServingSettingsError
from rap_env.memory import MemoryModel
from rap_env.models.device import choose_device, drop_unused_pages
from rap_env.request import Request
from rap_env.runtime.memory_meter import Meter, ResidentMeter, resident_bytes
from rap_env.runtime.memory_source import HEADROOM_BYTES, GivenMemory, MemorySource, open_memory
from rap_env.serving.preflight import too_little
from rap_env.serving.settings import ServerSettings, parse_bytes

if TYPE_CHECKING:
    from rap_env.models.live.elastic import ElasticLLM
    from rap_env.runtime.controller import RuntimeController

log = logging.getLogger(__name__)

LimitSource = Literal["setting", "file", "admin"]
"""What set a limit last: a setting, the file, or a request of an administrator."""

_SETTLE_S = 0.05  # for which a file must be unchanged: a half-written one changes again
_LONGEST_TEXT = 64
_MOST_RETRY_S = 60
_MIB = 2**20
_SLACK_BYTES = 20 * _MIB
"""Allowance for what the estimate of the bytes that loading takes leaves out, such as the
vocabulary of grammars: 10 MiB for the default model's 49,152 tokens."""


class LiveLimit:
    """A limit that operators change while the server runs; call it to get the present bytes.

    The last change holds, whether the file or an administrator made it. As long as the
    file does not exist the limit stays as it is. A file that is incomplete, wrong or too small
    changes nothing, and one warning is logged.

    Args:
        name: The setting that it is: ``memory``, of the whole process, or ``model_memory``.
        limit_bytes: Value of the setting.
        file: A file with a size such as ``300MiB``, which is read whenever it changes.

    Attributes:
        source: What set the present value.
        nothing_fits: Says why no request fits the limit; empty if one does.

    Raises:
        ServingSettingsError: The file exists and does not hold a size.
    """

    def __init__(self, name: str, limit_bytes: int, file: str | None = None) -> None:
        self.name = name
        self.source: LimitSource = "setting"
        self._check: Callable[[int], None] = lambda limit_bytes: None
        self.nothing_fits: Callable[[], str] = lambda: ""
        self._bytes = limit_bytes
        self._set_s = time.monotonic()
        self._file = None if file is None else Path(file)
        self._lock = threading.RLock()
        self._read_state = self._state()
        if self._read_state is not None:
            self.set(self._read(), "file")

    def __call__(self) -> int:
        """The bytes that are allowed now."""
        if self._file is not None:
            with self._lock:
                self._follow()
        return self._bytes

    def attach(self, check: Callable[[int], None], nothing_fits: Callable[[], str]) -> None:
        """Check the present value and all later ones against what is served.

        Args:
            check: Raises a `ServingSettingsError` for a number of bytes that is too small.
            nothing_fits: Says why no request fits; empty if one does.
        """
        self._check, self.nothing_fits = check, nothing_fits
        check(self())

    @property
    def of_process(self) -> bool:
        """Whether it limits the whole process, not the model alone."""
        return self.name == "memory"

    @property
    def retry_after_s(self) -> int:
        """Seconds after which to ask again where nothing fits: as long as that has lasted, 1 to 60.

        That counts from the last change of the limit.
        """
        return max(1, min(_MOST_RETRY_S, round(time.monotonic() - self._set_s)))

    def set(self, limit_bytes: int, source: LimitSource) -> None:
        """Change the limit; a `ServingSettingsError` if it is too small, and it stays as it was."""
        self._check(limit_bytes)
        with self._lock:
            if (limit_bytes, source) == (self._bytes, self.source):
                return
            self._bytes, self.source, self._set_s = limit_bytes, source, time.monotonic()
            log.info("%s is now %s (%s).", self.name, _mib(limit_bytes), source)
            if problem := self.nothing_fits():
                log.warning("%s", problem)

    def _follow(self) -> None:
        """Read the file if it has changed, once its own time says that it is no longer written."""
        state = self._state()
        if state == self._read_state:
            return
        if state is not None and abs(time.time() - state[2] / 1e9) < _SETTLE_S:
            return
        self._read_state = state
        try:
            self.set(self._read(), "file")
        except ServingSettingsError as error:
            log.warning("%s stays at %s: %s", self.name, _mib(self._bytes), error)

    def _state(self) -> tuple[int, int, int] | None:
        """What changes with the content of the file; None if there is none."""
        if self._file is None:
            return None
        try:
            status = self._file.stat()
        except OSError:
            return None
        return status.st_ino, status.st_size, status.st_mtime_ns

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


def open_limit(settings: ServerSettings) -> LiveLimit | None:
    """The limit of the settings; None if the budget is the system's free memory.

    Raises:
        ServingSettingsError: `memory_file` exists and does not hold a size, or the memory of the
            process is limited and the model is not on a CPU under Linux.
    """
    if settings.model_bytes is not None:
        return LiveLimit("model_memory", settings.model_bytes, settings.memory_file)
    if settings.process_bytes is None:
        return None
    device = choose_device(settings.device)
    if device.type != "cpu" or sys.platform != "linux":
        raise ServingSettingsError(
            f"memory={settings.memory} limits the resident memory of the process, which is measured"
            f" only for a model on a CPU under Linux, not on {device} under {sys.platform}; set "
            "model_memory, the bytes of the model alone, instead."
        )
    return LiveLimit("memory", settings.process_bytes, settings.memory_file)


def check_start(model: str, limit: LiveLimit, loading_bytes: int) -> None:
    """Check that the process will stay within its limit while it loads the model.

    Args:
        model: What messages call the model.
        limit: The limit of the process.
        loading_bytes: Bytes that loading still takes at its peak.

    Raises:
        ServingSettingsError: It would not; the message says how much is needed.
    """
    import rap_env.runtime.sampling  # noqa: F401  it takes tens of megabytes

    drop_unused_pages()
    resident = resident_bytes()[1]
    need = resident + loading_bytes + _SLACK_BYTES
    if need > limit():
        raise ServingSettingsError(
            f"memory is {_mib(limit())}, but the process needs {_mib(need)} to "
            f"start with {model}: {_mib(resident)} without it, and "
            f"{_mib(need - resident)} while it is loaded. Set memory to at least that, or "
            "model_memory to limit the model alone."
        )


def other_bytes(llm: ElasticLLM) -> int:
    """Bytes of the process now that are not the model's weights and caches."""
    return max(0, resident_bytes()[0] - llm.held_bytes.total)


def check_started(model: str, limit: LiveLimit) -> None:
    """Check that the process stayed within its limit while it started.

    Raises:
        ServingSettingsError: It did not; the message says how much it took.
    """
    peak = resident_bytes()[0]
    if peak > limit():
        raise ServingSettingsError(
            f"memory is {_mib(limit())}, but the process took {_mib(peak)} to start with "
            f"{model}; set memory to at least that, or model_memory to limit the model alone."
        )


def open_budget(
    settings: ServerSettings, llm: ElasticLLM, limit: LiveLimit | None, meter: Meter
) -> MemorySource:
    """The source of the model's budget; `meter` measures what the model uses.

    Raises:
        MemorySourceError: The system does not report its free memory.
    """
    if limit is None:
        reserve = settings.reserve_bytes
        return open_memory(settings.memory, device=llm.device, reserve_bytes=reserve)
    resident = meter if limit.of_process and isinstance(meter, ResidentMeter) else None
    return GivenMemory(limit, meter=resident)


def least_check(
    model: str, llm: ElasticLLM, controller: RuntimeController
) -> Callable[[int], None]:
    """What rejects a limit in which not even one token fits with every block removed."""
    least, source = (
        MemoryModel(llm).peak_bytes_without_blocks(Request(1, 1, 1)),
        controller.monitor.source,
    )

    def check(limit_bytes: int) -> None:
        if source.other_bytes is None:
            if limit_bytes < least:
                raise ServingSettingsError(too_little(model, least, limit_bytes))
            return
        others = source.other_bytes + HEADROOM_BYTES
        if limit_bytes < least + others:
            raise ServingSettingsError(
                f"memory must be at least {_mib(others + least)} for {model}: {_mib(least)} for "
                f"one token without any block and {_mib(others)} for everything else in the "
                f"process, not {_mib(limit_bytes)}; give more."
            )

    return check


def limit_text(controller: RuntimeController) -> str:
    """What a user should know of the memory limit, as a sentence."""
    monitor = controller.monitor
    source, budget = monitor.source, _mib(max(0, monitor.budget_bytes))
    if source.process_bytes is not None and source.other_bytes is not None:
        return (
            f"Memory: at most {_mib(source.process_bytes)} for the whole process, of which "
            f"{_mib(source.other_bytes)} are everything but the model; it may take {budget} now."
        )
    text = f"Memory: at most {budget} for the model now ({source.name})"
    if isinstance(monitor.meter, ResidentMeter):
        return f"{text}; the rest of the process takes {_mib(monitor.meter.baseline_bytes)} more."
    return f"{text}."


def _mib(number: int) -> str:
    """A number of bytes, rounded up to whole MiB, as settings accept it."""
    return f"{-(-number // _MIB)}MiB"
