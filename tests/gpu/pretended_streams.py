"""Pretended CUDA streams: what is started in a stream of its own runs as late as it may.

The computing stream runs at once, as all else on the pretended GPU. A copy in another stream waits
until the computing stream or the host waits for an event that was recorded after it. Whoever reads
its result, or overwrites its source, without such a wait gets wrong values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch

_current: list[Stream] = []


class Event:
    """A point in a stream."""

    def __init__(self) -> None:
        self.stream: Stream | None = None
        self.started = 0

    def record(self, stream: Stream) -> None:
        self.stream, self.started = stream, stream.started
        Stream.log.append(("record", stream.name, self))

    def synchronize(self) -> None:
        Stream.log.append(("wait", "host", self))
        self.reached()

    def reached(self) -> None:
        """Run what was started before the event was recorded."""
        if self.stream is not None:
            self.stream.run(self.started)


class Stream:
    """What was started in a stream, and how much of it has run.

    Attributes:
        log: What happened in all streams, in order: an action, the stream's name, and the event.
    """

    log: ClassVar[list[tuple[str, str, Event | None]]] = []

    def __init__(self, _device: Any = None, name: str = "copies") -> None:
        self.name = name
        self.started = 0
        self._waiting: list[Callable[[], object]] = []

    def start(self, run: Callable[[], object]) -> None:
        self.started += 1
        self._waiting.append(run)
        Stream.log.append(("copy", self.name, None))

    def run(self, count: int) -> None:
        """Run what was started first, up to a number."""
        while self._waiting and self.started - len(self._waiting) < count:
            self._waiting.pop(0)()

    def wait_event(self, event: Event) -> None:
        Stream.log.append(("wait", self.name, event))
        if self is COMPUTING:
            event.reached()


COMPUTING = Stream(name="computing")


@contextlib.contextmanager
def in_stream(stream: Stream) -> Iterator[None]:
    """Start copies in a stream, in a ``with`` block."""
    _current.append(stream)
    try:
        yield
    finally:
        _current.pop()


def started(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether an operation was started in another stream than the computing one."""
    if not _current:
        return False
    if func.overloadpacket is not torch.ops.aten.copy_:
        raise NotImplementedError(f"{func} in a stream of its own is not pretended.")
    _current[-1].start(lambda: args[0].copy_(args[1]))
    return True
