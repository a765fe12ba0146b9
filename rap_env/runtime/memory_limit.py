"""Where a memory limit comes from: a set value, a file, or what the system reports as free."""

from __future__ import annotations

import logging
import math
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from rap_env.errors import MemorySourceError, ServingSettingsError, UnknownNameError
from rap_env.models.device import free_bytes
from rap_env.request import mebibytes, parse_bytes
from rap_env.runtime.memory_monitor import HEADROOM_BYTES, MemorySource, ResidentMeter

log = logging.getLogger(__name__)

_CPU = torch.device("cpu")
_SETTLE_S = 0.05  # for which a file must be unchanged: a half-written one changes again
_LONGEST_TEXT = 64


class GivenMemory(MemorySource):
    """A budget set from outside: of the model, or of the whole process.

    Of a process, the model may use what is left beside everything else that is resident
    (interpreter, libraries, tokenizer, server, freed memory that the C library keeps), which
    is the meter's baseline (`Meter.measure_others`).

    Args:
        budget: The budget in bytes, or a function that returns it whenever it is called.
        limit_bytes: The largest budget that the function will ever return, if known. A
            request that does not fit it is rejected on arrival; one that does waits.
        meter: Measures the process, if the budget is that of the process.
    """

    name = "given"
    is_given = True

    def __init__(
        self,
        budget: Callable[[], float] | int,
        *,
        limit_bytes: int | None = None,
        meter: ResidentMeter | None = None,
    ) -> None:
        self._limit_bytes = limit_bytes
        self._meter = meter
        if callable(budget):
            self._read = budget
        else:
            fixed = budget
            self._read = lambda: fixed
            self._limit_bytes = fixed if limit_bytes is None and meter is None else limit_bytes

    @property
    def limit_bytes(self) -> int | None:
        """The given limit, or the given number of bytes."""
        return self._limit_bytes

    @property
    def process_bytes(self) -> int | None:
        """The given budget, if it is that of the process."""
        return None if self._meter is None else int(self._read())

    @property
    def other_bytes(self) -> int | None:
        """Resident bytes of all that is not the model, if the budget is that of the process."""
        return None if self._meter is None else self._meter.baseline_bytes

    def budget_bytes(self, used_bytes: int) -> int:
        """The given budget; of a process, less `other_bytes` and the headroom.

        Raises:
            MemorySourceError: The function did not return a finite number.
        """
        budget = self._read()
        if not math.isfinite(budget):
            raise MemorySourceError(
                f"The budget function returned {budget!r}; it should return a number of bytes."
            )
        others = self.other_bytes
        return max(0, int(budget) - (0 if others is None else others + HEADROOM_BYTES))


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
        self.of_process = name == "memory"
        self._bytes = limit_bytes
        self._source: MemorySource | None = None
        self._model, self._least_bytes = "", 0
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

    def attach(self, model: str, least_bytes: int, source: MemorySource) -> None:
        """Check the present value and all later ones against what is served.

        Args:
            model: What messages call the model.
            least_bytes: What one token takes with the smallest plan.
            source: The budget that the limit gives.

        Raises:
            ServingSettingsError: The present value is too small.
        """
        self._model, self._least_bytes, self._source = model, least_bytes, source
        self._check(self())

    def _check(self, limit_bytes: int) -> None:
        others = None if self._source is None else self._source.other_bytes
        least = self._least_bytes + (0 if others is None else others + HEADROOM_BYTES)
        if limit_bytes < least:
            beside = (
                ""
                if others is None
                else f", {mebibytes(least - self._least_bytes)} of it for everything but the model"
            )
            raise ServingSettingsError(
                f"{self.name} must be at least {least:,} bytes ({mebibytes(least)}) for "
                f"{self._model}, which its smallest plan needs for one token{beside}, not "
                f"{limit_bytes:,}; give more."
            )

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


class SystemMemory(MemorySource):
    """What a system reports as free, less `reserve_bytes`, and what the runtime uses already."""

    @abstractmethod
    def free_bytes(self) -> int:
        """Bytes that could be allocated now; negative if too many are in use."""

    @abstractmethod
    def total_bytes(self) -> int | None:
        """All bytes of the system, if they are known."""

    @property
    def limit_bytes(self) -> int | None:
        """All bytes of the system, less the reserve."""
        total = self.total_bytes()
        return None if total is None else max(0, total - self.reserve_bytes)

    def budget_bytes(self, used_bytes: int) -> int:
        """Used and free bytes, less the reserve; negative if only a part of the reserve is free."""
        return max(0, used_bytes + self.free_bytes()) - self.reserve_bytes


CUDA_RESERVE_BYTES = 2**28
"""What `CudaMemory` leaves free unless told otherwise."""


class CudaMemory(SystemMemory):
    """All free memory of a CUDA device, shared with other processes.

    Memory that PyTorch's allocator holds in reserve counts as free: the allocator reuses it.
    The reserve is for the workspaces of libraries, kernels that are loaded at their first
    use, and gaps between the allocator's pieces.
    """

    def __init__(
        self, device: torch.device | str = "cuda", reserve_bytes: int = CUDA_RESERVE_BYTES
    ) -> None:
        self.device = torch.device(device)
        self.name = str(self.device)
        self.reserve_bytes = reserve_bytes
        self.free_bytes()  # fail early where nothing can be read

    def free_bytes(self) -> int:
        """Free bytes, those that the allocator holds in reserve included."""
        try:
            return free_bytes(self.device)
        except (RuntimeError, AssertionError) as error:
            raise MemorySourceError(
                f"{self.name} does not report its free memory: {error}."
            ) from error

    def total_bytes(self) -> int:
        """All memory of the device."""
        return torch.cuda.mem_get_info(self.device)[1]


_UNLIMITED_BYTES = 2**60  # version 1 writes a number near 2**63 where there is no limit


@dataclass(frozen=True)
class _CgroupVersion:
    """Names of one version's files and of the counters in its `memory.stat`."""

    limits: tuple[str, ...]
    usage: str
    cached: tuple[str, ...]
    pinned: tuple[str, ...]


_V1 = _CgroupVersion(
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
    ("total_mapped_file", "total_dirty", "total_writeback"),
)
_V2 = _CgroupVersion(
    ("memory.max", "memory.high"),
    "memory.current",
    ("inactive_file", "active_file"),
    ("file_mapped", "file_dirty", "file_writeback"),
)


class CgroupMemory(SystemMemory):
    """Free memory of this process's control groups (Linux, version 1 and 2) and of the machine.

    A group's limit counts every page that its processes use, file cache included. The kernel
    drops clean, unmapped file cache as soon as memory is needed, so that counts as free here.
    Any group above this process's own may have a limit too; the tightest one holds.

    Raises:
        MemorySourceError: This system reports neither.
    """

    name = "cgroup"

    def __init__(
        self,
        reserve_bytes: int = 0,
        *,
        mount: Path = Path("/sys/fs/cgroup"),
        proc: Path = Path("/proc"),
    ) -> None:
        self.reserve_bytes = reserve_bytes
        self._meminfo = proc / "meminfo"
        self._version, self._groups = _find_groups(mount, proc)
        self.free_bytes()  # fail early where nothing can be read

    def total_bytes(self) -> int | None:
        """The tightest limit now, or all memory of the machine."""
        limits = [*(limit for limit, _ in self._limited()), self._machine("MemTotal")]
        return min((limit for limit in limits if limit is not None), default=None)

    def free_bytes(self) -> int:
        """Bytes that this process could allocate before the kernel kills a process."""
        try:
            free = [
                limit - int(_text(group / self._version.usage)) + self._droppable(group)
                for limit, group in self._limited()
            ]
        except (OSError, ValueError) as error:
            raise MemorySourceError(
                f"The memory of control group {self._groups[0]} cannot be read: {error}."
            ) from error
        machine = self._machine("MemAvailable")
        if machine is not None:
            free.append(machine)
        if not free:
            raise MemorySourceError(
                "Neither a control group nor /proc/meminfo reports free memory on this system; "
                "give the budget as a number of bytes."
            )
        return min(free)

    def _limited(self) -> Iterator[tuple[int, Path]]:
        """Limits now, with the groups that have one."""
        for group in self._groups:
            read = [_limit(group / name) for name in self._version.limits]
            limits = [limit for limit in read if limit is not None]
            if limits:
                yield min(limits), group

    def _droppable(self, group: Path) -> int:
        pairs = (line.split() for line in _text(group / "memory.stat").splitlines())
        stat = dict(pair for pair in pairs if len(pair) == 2)
        cached = sum(int(stat.get(name, 0)) for name in self._version.cached)
        return max(0, cached - sum(int(stat.get(name, 0)) for name in self._version.pinned))

    def _machine(self, entry: str) -> int | None:
        try:
            text = _text(self._meminfo)
        except OSError:
            return None
        for line in text.splitlines():
            if line.startswith(f"{entry}:"):
                return int(line.split()[1]) * 1024
        return None


def open_memory(
    source: MemorySource | Callable[[], float] | int | str = "auto",
    *,
    device: torch.device = _CPU,
    reserve_bytes: int | None = None,
) -> MemorySource:
    """Make the memory source for a setting.

    Args:
        source: ``"cgroup"``, ``"cuda"``, ``"auto"`` (by the device), a number of bytes, a
            function that returns one, or a source.
        device: Where the model is.
        reserve_bytes: Bytes that a source which asks the system leaves free; None for its
            default.

    Raises:
        UnknownNameError: There is no source of that name.
        MemorySourceError: The system does not report free memory.
    """
    if source == "auto":
        source = "cuda" if device.type == "cuda" else "cgroup"
    if isinstance(source, str):
        if source == "cuda":
            reserve_bytes = CUDA_RESERVE_BYTES if reserve_bytes is None else reserve_bytes
            return CudaMemory(device if device.type == "cuda" else "cuda", reserve_bytes)
        if source == "cgroup":
            return CgroupMemory(reserve_bytes or 0)
    elif isinstance(source, MemorySource):
        return source
    elif callable(source) or (hasattr(source, "__index__") and not isinstance(source, bool)):
        return GivenMemory(source)
    hint = "Or give a number of bytes, or a function that returns one."
    raise UnknownNameError("memory source", source, ["auto", "cgroup", "cuda"], hint)


def _find_groups(mount: Path, proc: Path) -> tuple[_CgroupVersion, tuple[Path, ...]]:
    """The control groups of this process, from its own to the root."""
    try:
        lines = _text(proc / "self" / "cgroup").splitlines()
    except OSError:
        return _V2, ()
    entries = [line.split(":", 2) for line in lines if line.count(":") >= 2]
    for _, controllers, path in entries:
        if "memory" in controllers.split(","):
            return _V1, _upwards(mount / "memory", path)
    for _, controllers, path in entries:
        if not controllers:
            return _V2, _upwards(mount, path)
    return _V2, ()


def _upwards(root: Path, path: str) -> tuple[Path, ...]:
    """The folder of `path` and its parents up to the root; the root alone if it is missing.

    In a container the path may be the host's, and only the root of the mount is visible.
    """
    parts = [part for part in path.split("/") if part]
    group = root.joinpath(*parts)
    if ".." in parts or not group.is_dir():
        return (root,)
    return (group, *list(group.parents)[: len(parts)])


def _limit(path: Path) -> int | None:
    """The limit in a file; None if the file is missing or sets no limit."""
    try:
        text = _text(path).strip()
    except OSError:
        return None
    if text == "max":
        return None
    limit = int(text)
    return None if limit >= _UNLIMITED_BYTES else limit


def _text(path: Path) -> str:
    return path.read_text(encoding="ascii", errors="replace")
