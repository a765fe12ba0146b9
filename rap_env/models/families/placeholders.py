"""Modules in the place of removed blocks, which add nothing.

The layer's `forward` stays transformers' own: it calls these modules and adds their output to
the residual stream. A copy of this file lies in every pruned checkpoint, where transformers
runs it without this package: it imports torch alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

PLACEHOLDER_DTYPE = torch.uint8
"""Dtype of a removed block's entries in a KV cache; no model computes in it."""

# transformers >= 5.24 passes the cache to its modules as `cache`, older versions as
# `past_key_values`; GPT-NeoX uses `layer_past` in both.
_CACHE_ARGUMENTS = ("cache", "past_key_values", "layer_past")


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """The KV cache among the keyword arguments of a module, or None."""
    caches = (arguments[name] for name in _CACHE_ARGUMENTS if arguments.get(name) is not None)
    return next(caches, None)


class RemovedBlock(nn.Module):
    """Base class of the placeholders for removed blocks."""

    def _added(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Zeros of the same shape and dtype, in the memory of one number."""
        return hidden_states.new_zeros(()).expand(hidden_states.shape)


class RemovedAttention(RemovedBlock):
    """Placeholder for a removed attention block; writes placeholder entries to the KV cache.

    Transformers reads the length of the past, and the sizes of its attention masks, from the
    cache of one particular layer. If that layer wrote nothing, positions and masks of all
    other layers would be wrong without an error. So the removed block still writes one uint8
    value for each token and sequence as key and another as value (2 bytes; the memory
    arithmetic counts 0).
    """

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        """Zeros for states of shape (batch, tokens, hidden), and no attention weights."""
        cache = cache_in(kwargs)
        if cache is not None:
            batch, tokens = hidden_states.shape[:2]
            row = placeholder_entries(batch, tokens, hidden_states.device)
            cache.update(row, row, self.layer_idx)
        return self._added(hidden_states), None


class RemovedFFN(RemovedBlock):
    """Placeholder for a removed feed-forward block."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Zeros of the shape and dtype of `hidden_states`."""
        return self._added(hidden_states)


def placeholder_entries(batch: int, tokens: int, device: torch.device) -> torch.Tensor:
    """Cache entries for tokens of a removed block, (batch, 1, tokens, 1).

    One value wide, not zero: transformers treats a cache layer without elements as empty.
    """
    return torch.zeros((batch, 1, tokens, 1), dtype=PLACEHOLDER_DTYPE, device=device)


def remove_blocks(model: Any, removed: Mapping[str, Sequence[str]]) -> None:
    """Put placeholders in the places of blocks for good, before weights are loaded.

    Args:
        model: A causal language model of transformers.
        removed: By a block's name, the paths of its modules, the one that returns its output
            first.
    """
    for name, (first, *others) in removed.items():
        layer, _, kind = name.removeprefix("layer").partition(".")
        attention = kind == "attn"
        model.set_submodule(first, RemovedAttention(int(layer)) if attention else RemovedFFN())
        for path in others:
            model.set_submodule(path, nn.Identity())
