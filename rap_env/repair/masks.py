"""Masks to train stubs under: from those that a good policy makes to random ones."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rap_env.blocks import BlockMask
from rap_env.costs import request_costs
from rap_env.memory import MemoryModel
from rap_env.workload import RequestSampler

NOISE = (0.0, 0.5, 1.0, 2.0, 4.0)
"""Spread of the noise on the logarithm of a block's price; each is as likely. At 0 the mask is
that of a policy which follows the prices, at 4 hardly more than chance."""

_LEAST_LOSS = 1e-3  # a block that costs nothing, or less, is as cheap as this one


@dataclass(frozen=True)
class MaskDraw:
    """Draws a request and removes blocks by a noisy price until it fits.

    The price of a block is its loss over the bytes that its removal frees for the request, so
    long requests lose attention blocks and short ones feed-forward blocks.

    Attributes:
        memory: The model's byte arithmetic, stubs included.
        requests: Draws requests.
        losses: Rise in NLL at the removal of each block, nats per token, (2L,), such as
            `rap_env.importance.GSIProfile.marginal_loss`.
        noise: Spreads to choose from.
    """

    memory: MemoryModel
    requests: RequestSampler
    losses: npt.NDArray[np.float64]
    noise: tuple[float, ...] = NOISE

    @property
    def settings(self) -> dict[str, Any]:
        """What the masks are drawn by beside the model, for records."""
        sampler: Any = self.requests
        known = fields(sampler) if is_dataclass(sampler) else ()
        # Its repr also says where in memory its model lies.
        named = {f.name: getattr(sampler, f.name) for f in known if f.init and f.name != "memory"}
        shown = ", ".join(f"{name}={value!r}" for name, value in named.items())
        return {
            "losses": self.losses.tolist(),
            "requests": f"{type(sampler).__name__}({shown})",
            "noise": list(self.noise),
        }

    def draw(self, rng: np.random.Generator) -> BlockMask:
        """A mask; all randomness comes from the generator."""
        request = self.requests.sample(rng)
        costs = request_costs(self.memory, request.batch_size, request.seq_len_tokens)
        freed = np.maximum(costs.freed_bytes, 1)
        price = np.log(np.maximum(self.losses, _LEAST_LOSS)) - np.log(freed)
        price = price + rng.choice(self.noise) * rng.standard_normal(len(price))
        return costs.remove_until_fits(np.argsort(price, kind="stable"), request.budget_bytes)
