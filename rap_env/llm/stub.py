"""What may stand in a removed block's place: a low-rank linear map of the normalised state."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

EPSILON = 1e-6
"""Added to the mean square of a state before its root is taken."""


def normalised(hidden_states: torch.Tensor) -> torch.Tensor:
    """States divided by the root of their mean square, (..., H) -> (..., H), in their dtype.

    The norm of `Stub`: the one of Zhang and Sennrich 2019 without weights, which a linear map
    behind it holds as well. It is taken in float32, since squares overflow half precision.
    """
    mean_square = hidden_states.float().square().mean(dim=-1, keepdim=True)
    return hidden_states * torch.rsqrt(mean_square + EPSILON).to(hidden_states.dtype)


class Stub(nn.Module):
    """Adds ``up @ down @ norm(x) + mean`` to the residual stream x where a block was.

    Shapes: H hidden width, r rank. The norm divides by the root mean square.

    Args:
        down: (r, H); rank 0 (no rows) leaves the mean alone.
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
        """A stub that adds nothing, to be filled."""
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
        """This stub on a device; a copy of its own, also on the same one."""
        return Stub(*(part.detach().to(device, copy=True) for part in self.parameters()))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What is added to states of shape (..., H), of the same shape and dtype."""
        dtype = hidden_states.dtype  # while stubs are trained, they are in float32
        mean = self.mean.to(dtype)
        if not self.rank:
            return mean.expand(hidden_states.shape)
        inner = functional.linear(normalised(hidden_states), self.down.to(dtype))
        return functional.linear(inner, self.up.to(dtype), mean)
