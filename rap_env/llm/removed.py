"""What takes the place of a removed block's modules: it adds nothing, or what a stub says.

The layer's `forward` stays transformers' own: it calls these modules, adds what they give
to the residual stream, and goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

PLACE_DTYPE = torch.uint8
"""Of what stands in the cache for a token of a removed block; no model computes in it."""

# transformers >= 5.24 hands its modules the cache as `cache`, older ones as
# `past_key_values`; GPT-NeoX says `layer_past` in both.
_CACHE_ARGUMENTS = ("cache", "past_key_values", "layer_past")


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """The KV cache among the keyword arguments of a module, or None."""
    found = (arguments[name] for name in _CACHE_ARGUMENTS if arguments.get(name) is not None)
    return next(found, None)


class Removed(nn.Module):
    """Stands for a removed block.

    Attributes:
        stub: Gives what is added in the block's place; None adds nothing.
    """

    stub: nn.Module | None

    def __init__(self) -> None:
        super().__init__()
        self.register_module("stub", None)

    def _added(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.stub is None:
            return _zeros_like(hidden_states)
        added: torch.Tensor = self.stub(hidden_states)
        return added


def places(batch: int, tokens: int, device: torch.device) -> torch.Tensor:
    """What stands in the cache for tokens of a removed block, (batch, 1, tokens, 1)."""
    return torch.zeros((batch, 1, tokens, 1), dtype=PLACE_DTYPE, device=device)


def _zeros_like(hidden_states: torch.Tensor) -> torch.Tensor:
    """Zeros of the same shape and dtype that take the memory of one number."""
    return hidden_states.new_zeros(()).expand(hidden_states.shape)


class RemovedAttention(Removed):
    """Stands for a removed attention block; leaves a place holder in the KV cache.

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
        """What is added to states of shape (batch, tokens, hidden), and no attention weights."""
        cache = cache_in(kwargs)
        if cache is not None:
            batch, tokens = hidden_states.shape[:2]
            # One value wide, not zero: a cache layer without elements counts as empty.
            row = places(batch, tokens, hidden_states.device)
            cache.update(row, row, self.layer_idx)
        return self._added(hidden_states), None


class RemovedFFN(Removed):
    """Stands for a removed feed-forward block."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """What is added, of the shape and dtype of `hidden_states`."""
        return self._added(hidden_states)
