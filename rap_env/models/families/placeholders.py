"""Modules in the place of removed blocks: placeholders that add nothing, and stubs.

The layer's `forward` stays transformers' own: it calls these modules and adds their output to the
residual stream. A copy of this file lies in every pruned checkpoint, where transformers runs it
without this package: it imports torch alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

EPSILON = 1e-6
"""Added to the mean square of a state before the square root."""

PLACEHOLDER_DTYPE = torch.uint8
"""Dtype of a removed block's entries in a KV cache; no model computes in it."""

# transformers >= 5.24 passes the cache to its modules as `cache`, older versions as
# `past_key_values`; GPT-NeoX uses `layer_past` in both.
_CACHE_ARGUMENTS = ("cache", "past_key_values", "layer_past")


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """The KV cache among the keyword arguments of a module, or None."""
    caches = (arguments[name] for name in _CACHE_ARGUMENTS if arguments.get(name) is not None)
    return next(caches, None)


def normalised(hidden_states: torch.Tensor) -> torch.Tensor:
    """States divided by their root mean square, (..., H) -> (..., H), in their dtype.

    The norm of `Stub`: RMSNorm (Zhang and Sennrich 2019) without weights, since the linear map
    after it can contain them. It is computed in float32, because squares overflow half precision.
    """
    mean_square = hidden_states.float().square().mean(dim=-1, keepdim=True)
    return hidden_states * torch.rsqrt(mean_square + EPSILON).to(hidden_states.dtype)


class Stub(nn.Module):
    """Adds ``up @ down @ norm(x) + mean`` to the residual stream x in the place of a block.

    Shapes: H hidden width, r rank. The norm divides by the root mean square.

    Args:
        down: (r, H); with rank 0 (no rows) only the mean is added.
        up: (H, r).
        mean: (H,).
    """

    def __init__(self, down: torch.Tensor, up: torch.Tensor, mean: torch.Tensor) -> None:
        super().__init__()
        self.down = nn.Parameter(down, requires_grad=False)
        self.up = nn.Parameter(up, requires_grad=False)
        self.mean = nn.Parameter(mean, requires_grad=False)

    @classmethod
    def zeros(cls, rank: int, hidden_size: int, dtype: torch.dtype) -> Stub:
        """A stub that adds nothing, for values to be loaded into."""
        shapes = ((rank, hidden_size), (hidden_size, rank), (hidden_size,))
        return cls(*(torch.zeros(shape, dtype=dtype) for shape in shapes))

    @property
    def rank(self) -> int:
        """Rows of `down`."""
        return len(self.down)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(parameter.nbytes for parameter in self.parameters())

    def on(self, device: torch.device) -> Stub:
        """A copy of this stub on a device, even if it is on that device already."""
        return Stub(*(part.detach().to(device, copy=True) for part in self.parameters()))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The addition to states of shape (..., H), of the same shape and dtype."""
        dtype = hidden_states.dtype  # stubs are float32 while they are trained
        mean = self.mean.to(dtype)
        if not self.rank:
            return mean.expand(hidden_states.shape)
        inner = functional.linear(normalised(hidden_states), self.down.to(dtype))
        return functional.linear(inner, self.up.to(dtype), mean)


class RemovedBlock(nn.Module):
    """Base class of the placeholders for removed blocks.

    Attributes:
        stub: Computes the addition in the block's place; None adds nothing.
    """

    stub: nn.Module | None

    def __init__(self) -> None:
        super().__init__()
        self.register_module("stub", None)

    def _added(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.stub is None:
            # Zeros of the same shape and dtype in the memory of one number.
            return hidden_states.new_zeros(()).expand(hidden_states.shape)
        added: torch.Tensor = self.stub(hidden_states)
        return added


class RemovedAttention(RemovedBlock):
    """Placeholder for a removed attention block; writes placeholder entries to the KV cache.

    Transformers reads the length of the past, and the sizes of its attention masks, from the
    cache of one particular layer. If that layer wrote nothing, positions and masks of all other
    layers would be wrong without an error. So the removed block still writes one uint8 value for
    each token and sequence as key and another as value (2 bytes; the memory arithmetic counts 0).
    """

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        """The addition to states of shape (batch, tokens, hidden), and no attention weights."""
        cache = cache_in(kwargs)
        if cache is not None:
            batch, tokens = hidden_states.shape[:2]
            row = placeholder_entries(batch, tokens, hidden_states.device)
            cache.update(row, row, self.layer_idx)
        return self._added(hidden_states), None


class RemovedFFN(RemovedBlock):
    """Placeholder for a removed feed-forward block."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The addition, of the shape and dtype of `hidden_states`."""
        return self._added(hidden_states)


def placeholder_entries(batch: int, tokens: int, device: torch.device) -> torch.Tensor:
    """Cache entries for tokens of a removed block, (batch, 1, tokens, 1).

    One value wide, not zero: transformers treats a cache layer without elements as empty.
    """
    return torch.zeros((batch, 1, tokens, 1), dtype=PLACEHOLDER_DTYPE, device=device)


def remove_blocks(model: Any, removed: Mapping[str, Mapping[str, Any]]) -> None:
    """Put placeholders in the places of blocks for good, before weights are loaded.

    Args:
        model: A causal language model of transformers.
        removed: By a block's name, ``modules``, the paths of its modules, the one that returns
            its output first, and ``stub_rank``, the rank of a stub of zeros, for weights to be
            loaded into, or None.
    """
    width = model.config.get_text_config(decoder=True).hidden_size
    for name, entry in removed.items():
        layer, _, kind = name.removeprefix("layer").partition(".")
        block = RemovedAttention(int(layer)) if kind == "attn" else RemovedFFN()
        if entry["stub_rank"] is not None:
            block.stub = Stub.zeros(entry["stub_rank"], width, model.dtype)
        first, *others = entry["modules"]
        model.set_submodule(first, block)
        for path in others:
            model.set_submodule(path, nn.Identity())
