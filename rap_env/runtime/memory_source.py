"""How many bytes the runtime may take now: given, or found out from the system.

A source says a *budget*: bytes for weights, KV cache and workspace together. What the system
tells is how much is free, so a source of that kind adds what the runtime itself takes already.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from rap_env.errors import MemorySourceError, UnknownNameError

_UNLIMITED_BYTES = 2**60  # version 1 says "none" with a number near 2**63


@dataclass(frozen=True)
class _Version:
    """Names of one version's files and of the counters in its `memory.stat`."""

    limits: tuple[str, ...]
    usage: str
    cached: tuple[str, ...]
    pinned: tuple[str, ...]


_V1 = _Version(
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
    ("total_mapped_file", "total_dirty", "total_writeback"),
)
_V2 = _Version(
    ("memory.max", "memory.high"),
    "memory.current",
    ("inactive_file", "active_file"),
    ("file_mapped", "file_dirty", "file_writeback"),
)


class CgroupMemory:
    """What this process's control groups, and the machine, leave to the runtime.

    Args:
        reserve_bytes: Bytes to leave free.
        mount: Where the control groups are mounted.
        proc: Where the process file system is mounted.

    Attributes:
        name: ``"cgroup"``.

    Raises:
        MemorySourceError: This system tells neither.
    """

    def __init__(
        self,
        reserve_bytes: int = 0,
        *,
        mount: Path = Path("/sys/fs/cgroup"),
        proc: Path = Path("/proc"),
    ) -> None:
        self.name = "cgroup"
        self.reserve_bytes = reserve_bytes
        self._meminfo = proc / "meminfo"
        self._version, self._groups = _find_groups(mount, proc)
        self.free_bytes()  # an early error where nothing can be read

    @property
    def limit_bytes(self) -> int | None:
        """The tightest limit now, or all memory of the machine, less the reserve."""
        limits = [limit for limit, _ in self._limited()]
        machine = self._machine("MemTotal")
        found = [*limits, *([] if machine is None else [machine])]
        return max(0, min(found) - self.reserve_bytes) if found else None

    def budget_bytes(self, used_bytes: int) -> int:
        """What is used and what is free, less the reserve.

        Raises:
            MemorySourceError: The system does not tell any more.
        """
        return max(0, used_bytes + self.free_bytes() - self.reserve_bytes)

    def free_bytes(self) -> int:
        """Bytes that this process could take more, before anybody is killed for it.

        Raises:
            MemorySourceError: The system does not tell.
        """
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
                "Neither a control group nor /proc/meminfo tells how much memory is free here; "
                "give the budget as a number of bytes."
            )
        return min(free)

    def _limited(self) -> Iterator[tuple[int, Path]]:
        """Limits now, with the groups that have one."""
        for group in self._groups:
            said = [_limit(group / name) for name in self._version.limits]
            limits = [limit for limit in said if limit is not None]
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


def _find_groups(mount: Path, proc: Path) -> tuple[_Version, tuple[Path, ...]]:
    """This process's group and those above it, from the inside out."""
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
    """The folder of `path` and its parents up to the root; the root alone if it is not there.

    In a container the path may be the host's, of which only the root of the mount is seen.
    """
    parts = [part for part in path.split("/") if part]
    group = root.joinpath(*parts)
    if ".." in parts or not group.is_dir():
        return (root,)
    return (group, *list(group.parents)[: len(parts)])


def _limit(path: Path) -> int | None:
    """The limit in a file; None without a file, or where it sets none."""
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


__all__ = ["CgroupMemory", "CudaMemory", "GivenMemory", "MemorySource", "open_memory"]


@runtime_checkable
class MemorySource(Protocol):
    """Says how much memory the runtime may take.

    A source may also have `limit_bytes`, a number or None: the most that it will ever say.

    Attributes:
        name: For logs and metrics.
    """

    name: str

    def budget_bytes(self, used_bytes: int) -> int:
        """Bytes that the runtime may take now.

        Args:
            used_bytes: What it takes already.

        Raises:
            MemorySourceError: It cannot be found out.
        """


class GivenMemory:
    """A budget that somebody else decides.

    Args:
        function: Gives the budget in bytes whenever it is asked; or the budget itself.
        limit_bytes: The most that it will ever give, if that is known. A request that does not
            fit then is refused at once, and one that does is waited with.
        name: For logs and metrics.
    """

    def __init__(
        self,
        function: Callable[[], float] | int,
        *,
        limit_bytes: int | None = None,
        name: str = "given",
    ) -> None:
        self.name = name
        self.limit_bytes = limit_bytes
        if callable(function):
            self._function = function
        else:
            fixed = function
            self._function = lambda: fixed
            self.limit_bytes = fixed if limit_bytes is None else limit_bytes

    def budget_bytes(self, used_bytes: int) -> int:
        """What the function gives, whatever is used.

        Raises:
            MemorySourceError: That is no number of bytes.
        """
        budget = self._function()
        if not math.isfinite(budget):
            raise MemorySourceError(
                f"The budget function gave {budget!r}; it should give a number of bytes."
            )
        return max(0, int(budget))


class CudaMemory:
    """All that a CUDA device has free, whoever takes the rest.

    What PyTorch's allocator holds in reserve counts as free: it is handed out again.

    Args:
        device: The device.
        reserve_bytes: Bytes to leave free.
    """

    def __init__(self, device: torch.device | str = "cuda", reserve_bytes: int = 0) -> None:
        self.device = torch.device(device)
        self.name = str(self.device)
        self.reserve_bytes = reserve_bytes
        self.limit_bytes: int | None = max(0, self._asked()[1] - reserve_bytes)

    def budget_bytes(self, used_bytes: int) -> int:
        """What is used and what is free, less the reserve.

        Raises:
            MemorySourceError: The device does not answer.
        """
        free, _ = self._asked()
        kept = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return max(0, used_bytes + free + kept - self.reserve_bytes)

    def _asked(self) -> tuple[int, int]:
        try:
            free, total = torch.cuda.mem_get_info(self.device)
        except (RuntimeError, AssertionError) as error:
            raise MemorySourceError(
                f"{self.name} does not say how much memory it has free: {error}."
            ) from error
        return int(free), int(total)


def open_memory(
    source: MemorySource | Callable[[], float] | int | str = "auto",
    *,
    device: torch.device | str = "cpu",
    reserve_bytes: int = 0,
) -> MemorySource:
    """The memory source for a setting.

    Args:
        source: ``"cgroup"``, ``"cuda"``, ``"auto"`` (what suits the device), a number of bytes,
            a function that gives one, or a source.
        device: Where the model is.
        reserve_bytes: Bytes that a source which asks the system leaves free.

    Raises:
        UnknownNameError: There is no source of that name.
        MemorySourceError: The system does not tell.
    """
    place = torch.device(device)
    if isinstance(source, str):
        if source == "auto":
            source = "cuda" if place.type == "cuda" else "cgroup"
        if source == "cuda":
            return CudaMemory(place if place.type == "cuda" else "cuda", reserve_bytes)
        if source == "cgroup":
            return CgroupMemory(reserve_bytes)
        hint = "Or give a number of bytes, or a function."
        raise UnknownNameError("memory source", source, ["auto", "cgroup", "cuda"], hint)
    if isinstance(source, MemorySource):
        return source
    if callable(source) or _whole(source):
        return GivenMemory(source)
    hint = "Or give a number of bytes, or a function."
    raise UnknownNameError("memory source", source, ["auto", "cgroup", "cuda"], hint)


def _whole(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)
