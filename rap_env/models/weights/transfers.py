"""Copies between the host and CUDA devices."""

from __future__ import annotations

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
