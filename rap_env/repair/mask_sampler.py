"""Samples masks to train stubs under, from those of a good policy to random ones."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rap_env.costs import request_costs
from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.workload import RequestSampler

NOISE = (0.0, 0.5, 1.0, 2.0, 4.0)
"""Standard deviations of the noise on the logarithm of a block's price, equally likely. At 0 the
mask is that of a policy that follows the prices; at 4 it is close to random."""

_LEAST_DELTA_NLL = 1e-3  # nats per token; lower values, including negative ones, count as this


@dataclass(frozen=True)
class MaskSampler:
    """Samples a request and removes blocks in the order of a noisy price until it fits.

    The price of a block is its delta_nll divided by the bytes that its removal frees for the
    request, so long requests lose attention blocks and short ones feed-forward blocks.

    Attributes:
        memory: The model's byte arithmetic, including stubs.
        requests: Samples requests.
        delta_nll: Rise in NLL at the removal of each block, nats per token, (2L,), such as
            `rap_env.importance.profiles.GSIProfile.marginal_delta_nll`.
        noise: Standard deviations to choose from.
    """

    memory: MemoryModel
    requests: RequestSampler
    delta_nll: npt.NDArray[np.float64]
    noise: tuple[float, ...] = NOISE

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the sampler, without the model, for records."""
        sampler: Any = self.requests
        known = fields(sampler) if is_dataclass(sampler) else ()
        # `memory` is left out: its repr contains the address of the model.
        named = {f.name: getattr(sampler, f.name) for f in known if f.init and f.name != "memory"}
        shown = ", ".join(f"{name}={value!r}" for name, value in named.items())
        return {
            "losses": self.delta_nll.tolist(),
            "requests": f"{type(sampler).__name__}({shown})",
            "noise": list(self.noise),
        }

    def draw(self, rng: np.random.Generator) -> Plan:
        """Sample a mask; all randomness comes from the generator."""
        request = self.requests.sample(rng)
        costs = request_costs(self.memory, request.batch_size, request.seq_len_tokens)
        freed = np.maximum(costs.freed_bytes, 1)
        price = np.log(np.maximum(self.delta_nll, _LEAST_DELTA_NLL)) - np.log(freed)
        price = price + rng.choice(self.noise) * rng.standard_normal(len(price))
        return costs.remove_until_fits(np.argsort(price, kind="stable"), request.budget_bytes)
