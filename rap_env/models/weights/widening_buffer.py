"""The process's memory for widened weights: one buffer that all packed matrices use in turn."""

from __future__ import annotations

import os
import threading

import torch

_buffers: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}
_buffer_lock = threading.RLock()


def widening_buffer(values: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The process's buffer for widened weights, (values,); hold `buffer_in_use` while using it."""
    key = (device, dtype)
    if key not in _buffers or len(_buffers[key]) < values:
        _buffers.pop(key, None)
        with torch.inference_mode(False):
            _buffers[key] = torch.empty(values, dtype=dtype, device=device)
    return _buffers[key][:values]


def buffer_bytes() -> int:
    """Bytes of the process's buffers for widened weights."""
    return sum(buffer.nbytes for buffer in list(_buffers.values()))


def buffer_in_use() -> threading.RLock:
    """The lock to hold while the buffer is in use."""
    return _buffer_lock


def _after_fork() -> None:
    global _buffer_lock
    _buffer_lock = threading.RLock()  # a thread of the parent may hold it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
