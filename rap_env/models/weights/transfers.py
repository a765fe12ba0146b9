"""Copies between the host and CUDA devices."""

from __future__ import annotations

from collections.abc import Callable

import torch

ALIGN_BYTES = 64
"""Best for vector instructions, and the alignment of torch's own allocator."""

_LEAST_CHUNK, _MOST_CHUNK = 2**16, 2**26  # bytes
_CHUNKS = 16  # of a model, roughly


def send(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on a device: itself if it is there already; nothing waits for a CUDA device.

    A copy from one CUDA device to another is ordered among the work of both by torch.
    """
    if values.device == device:
        return values
    if device.type != "cuda":
        return values.to(device)
    return (values if values.is_cuda else values.pin_memory()).to(device, non_blocking=True)


class PinnedMemory:
    """Page-locked memory of the host, which CUDA devices copy to and from without waiting.

    torch rounds each pinned allocation up to a power of two. It is therefore taken in chunks of
    such a size, and given out in pieces that fill one chunk after the other; all of it is in use,
    except the end of the last chunk. It is freed with the last tensor in it.

    Args:
        expected_bytes: Bytes that will be taken, roughly.
    """

    def __init__(self, expected_bytes: int) -> None:
        size = 1 << (expected_bytes // _CHUNKS).bit_length()
        self.chunk_bytes = min(max(size, _LEAST_CHUNK), _MOST_CHUNK)
        self._left = torch.empty(0, dtype=torch.uint8)

    def take(self, nbytes: int) -> list[torch.Tensor]:
        """Memory for `nbytes` in one or more pieces, uint8."""
        pieces = []
        while nbytes:
            if not len(self._left):
                self._left = torch.empty(self.chunk_bytes, dtype=torch.uint8, pin_memory=True)
            pieces.append(self._left[:nbytes])
            self._left = self._left[nbytes:]
            nbytes -= len(pieces[-1])
        return pieces


def aligned(nbytes: int) -> int:
    """The bytes of a tensor in a buffer of several, with the gap to the next one."""
    return -(-nbytes // ALIGN_BYTES) * ALIGN_BYTES


class DoubleBuffer:
    """Two halves of memory on a CUDA device that are filled from the host in turn.

    One half is filled while what was started before still computes with the other. Copies run in a
    stream of their own, in this order:

    1. The copy waits for the computations that were started with the half it overwrites.
    2. Computations that are started later wait for the copy.
    3. The host writes its own half again only when the copy out of it has ended.

    Args:
        nbytes: Bytes of a half; it takes twice as much on the device, and pinned on the host.
        device: A CUDA device.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._filled, self._next = (_Half(nbytes, device) for _ in range(2))

    def fill(self, write: Callable[[torch.Tensor], object]) -> torch.Tensor:
        """Fill the half that was filled before last.

        Args:
            write: Writes the content into memory of the host, (nbytes,) uint8.

        Returns:
            The half on the device, (nbytes,) uint8. It holds the content for what is started from
            now until the call after the next.
        """
        computing = torch.cuda.current_stream(self._device)
        self._filled.used.record(computing)
        half = self._next
        half.copied.synchronize()
        write(half.host)
        self._copies.wait_event(half.used)
        with torch.cuda.stream(self._copies):
            half.device.copy_(half.host, non_blocking=True)
        half.copied.record(self._copies)
        computing.wait_event(half.copied)
        self._filled, self._next = half, self._filled
        return half.device


class _Half:
    """A half on the device and on the host, and events of its last use and of the last copy."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.device = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        self.used = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        # The device's memory may still be in use by what freed it.
        self.used.record(torch.cuda.current_stream(device))
