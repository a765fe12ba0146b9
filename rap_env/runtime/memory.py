"""How many bytes the runtime may take now: given, or found out from the system.

A source says a *budget*: bytes for weights, KV cache and workspace together. What the system
tells is how much is free, so a source of that kind adds what the runtime itself takes already.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch

from rap_env.errors import MemorySourceError, UnknownNameError
from rap_env.runtime.cgroup import CgroupMemory

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
