"""Budgets that a system reports: the free memory of a device, of control groups, of the machine."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rap_env.errors import MemorySourceError, UnknownNameError
from rap_env.models.device import free_bytes
from rap_env.runtime.memory_monitor import GivenMemory, MemorySource

_CPU = torch.device("cpu")


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
    elif callable(source) or _is_whole(source):
        return GivenMemory(source)
    hint = "Or give a number of bytes, or a function that returns one."
    raise UnknownNameError("memory source", source, ["auto", "cgroup", "cuda"], hint)


def _is_whole(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)


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
