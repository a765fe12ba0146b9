"""What stands in a removed block's place: modules without weights that add nothing.

They take the place of the block's own modules, so the layer's `forward` stays
transformers' own: it calls them, adds their zeros to the residual stream, and goes on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# transformers >= 5.24 hands its modules the cache as `cache`, older ones as
# `past_key_values`; GPT-NeoX says `layer_past` in both.
_CACHE_ARGUMENTS = ("cache", "past_key_values", "layer_past")


def _zeros_like(hidden_states: torch.Tensor) -> torch.Tensor:
    """Zeros of the same shape and dtype that take the memory of one number."""
    return hidden_states.new_zeros(()).expand(hidden_states.shape)


class RemovedAttention(nn.Module):
    """Stands for a removed attention block: zeros, and a place holder in the KV cache.

    Transformers reads the length of the past, and the sizes of its attention masks, from the
    cache of one particular layer. If that layer writes nothing, positions and masks of
    all others go wrong without an error. So the removed block still writes one uint8 value
    for each token and sequence as key and another as value (2 bytes; its true need is none,
    and the memory arithmetic says none).

    Args:
        layer_idx: Index of the layer in the cache.
    """

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        """Zeros for `hidden_states` of shape (batch, tokens, hidden), and no attention weights."""
        for name in _CACHE_ARGUMENTS:
            cache = kwargs.get(name)
            if cache is not None:
                batch, tokens = hidden_states.shape[:2]
                # One value wide, not zero: a cache layer without elements counts as empty.
                shape = (batch, 1, tokens, 1)
                row = torch.zeros(shape, dtype=torch.uint8, device=hidden_states.device)
                cache.update(row, row, self.layer_idx)
                break
        return _zeros_like(hidden_states), None


class RemovedFFN(nn.Module):
    """Stands for a removed feed-forward block: zeros."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Zeros of the shape and dtype of `hidden_states`."""
        return _zeros_like(hidden_states)


REMOVED = (RemovedAttention, RemovedFFN)
