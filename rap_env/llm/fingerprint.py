"""What identifies a model: a hash over its config and weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import torch

from rap_env.artifacts import canonical_json

# Entries of a config that say nothing about what the model computes, or (dtype) that the
# tensors themselves say.
_VOLATILE_CONFIG = {"architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}


def named_weights(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers by name; a tied tensor under each of its names."""
    for name, value in module.state_dict(keep_vars=True).items():
        if isinstance(value, torch.Tensor):
            yield name, value


def tensor_key(tensor: torch.Tensor) -> tuple[int, torch.dtype, int]:
    """Equal for two names of one tensor; its last entry is the tensor's bytes."""
    return tensor.data_ptr() or id(tensor), tensor.dtype, tensor.numel() * tensor.element_size()


def fingerprint_of(model: Any, read: Callable[[str, torch.Tensor], torch.Tensor]) -> str:
    """SHA-256 over the config and every weight (name, dtype, shape, bytes), in hex.

    Args:
        model: The model, with every block in its place.
        read: Gives the content of a weight, from its name and tensor.
    """
    config = json.loads(model.config.to_json_string())
    kept = {k: v for k, v in config.items() if k not in _VOLATILE_CONFIG and k[:1] != "_"}
    total = hashlib.sha256(canonical_json(kept).encode())
    seen = set()
    for name, tensor in sorted(named_weights(model), key=lambda item: item[0]):
        if (key := tensor_key(tensor)) in seen:
            continue
        seen.add(key)
        total.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = read(name, tensor).detach().cpu().contiguous().reshape(-1)
        total.update(flat.view(torch.uint8).numpy().data)
    return total.hexdigest()
