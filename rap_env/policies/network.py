"""The policy network for serving, in NumPy and float32, and the policy that follows it.

It chooses the same plans as the trained network of `agents.networks`, one action per pass,
without torch or stable-baselines3.

Shapes: N rows, of blocks or of items; V entries of a row's vector, W columns of a row
(`rap_env.policies.network_rows`), H hidden units.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from rap_env.errors import ArtifactError
from rap_env.ladder.observation import Observation, ObservationEncoder, ObservedState
from rap_env.plan import Plan
from rap_env.policies.network_rows import ROWS, Float32s, RowSpec
from rap_env.request import Request


@dataclass(frozen=True, eq=False)
class NetworkWeights:
    """The weights of a policy network, float32, and the inputs hidden from it.

    Attributes:
        first_weight: Of the first layer, (H, W).
        first_bias: Of the first layer, (H,).
        second_weight: Of the second layer, (H, H).
        second_bias: Of the second layer, (H,).
        last_weight: Of the score, (H,).
        linear_weight: Of the linear path from a row to its score, (W,).
        vectors: Learned vector of each row, (N, V); V = 0 for a network that serves any N.
        rows: What its rows are made of, a key of `rap_env.policies.network_rows.ROWS`.
        without: Names from `rap_env.policies.network_rows.ABLATIONS`.

    Raises:
        ArtifactError: The shapes do not fit together, a weight is not finite, or there is no
            such ablation or kind of rows.
    """

    first_weight: Float32s
    first_bias: Float32s
    second_weight: Float32s
    second_bias: Float32s
    last_weight: Float32s
    linear_weight: Float32s
    vectors: Float32s
    rows: str
    without: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, array in self.arrays().items():
            if not np.isfinite(array).all():
                raise ArtifactError(
                    f"The policy network's {name} contains NaN or infinity; train it again."
                )

    @property
    def spec(self) -> RowSpec:
        """What its rows are made of."""
        return ROWS[self.rows]

    @property
    def vector_width(self) -> int:
        """V, the width of a row's vector."""
        return int(self.vectors.shape[1]) if self.vectors.ndim == 2 else 0

    def arrays(self) -> dict[str, Float32s]:
        """The arrays by name."""
        names = [entry.name for entry in fields(self)]
        return {name: vars(self)[name] for name in names if name not in ("rows", "without")}


class PolicyNetwork:
    """Chooses what to lower on one model until a request fits.

    It does not change after construction, so threads may share it.

    Args:
        weights: The trained weights, with a vector for each item of the ladder, or none.
        encoder: Encodes observations of requests on the model.
    """

    def __init__(self, weights: NetworkWeights, encoder: ObservationEncoder) -> None:
        self.encoder, self._weights, spec = encoder, weights, weights.spec
        self._shown = spec.shown(weights.without)
        native = encoder.build(Request(1, 1, budget_bytes=1), Plan())[spec.key]
        self._near = spec.neighbours(native * self._shown[0])[None]
        no_vectors = np.zeros((len(encoder.ladder), 0), np.float32)
        self._vectors = weights.vectors if weights.vector_width else no_vectors
        # The linear path runs beside the first layer, as one more hidden unit.
        first = np.vstack([weights.first_weight, weights.linear_weight]).T  # (W, H + 1)
        columns = spec.columns(weights.vector_width)["vectors"]
        self._own, of_vectors, self._shared = np.split(first, [columns.start, columns.stop])
        bias = np.append(weights.first_bias, np.float32(0.0))
        self._constant = self._vectors @ of_vectors + bias

    def scores(self, observation: Observation) -> Float32s:
        """The score of each row, (N,)."""
        weights = self._weights
        seen = {key: np.asarray(array[None], np.float32) for key, array in observation.items()}
        own, shared = weights.spec.parts(np, seen, self._shown, self._near, self._vectors)
        hidden = own[0] @ self._own + (shared[0] @ self._shared + self._constant)
        linear = hidden[:, -1]
        hidden = np.maximum(hidden[:, :-1], 0) @ weights.second_weight.T + weights.second_bias
        return np.asarray(np.maximum(hidden, 0) @ weights.last_weight + linear)

    def can_fit(self, request: Request) -> bool:
        """Whether the request fits with every item lowered as far as possible."""
        costs = self.encoder.ladder_bytes.costs(request.batch_size, request.seq_len_tokens)
        return costs.least_peak_bytes <= request.budget_bytes

    def plan(self, request: Request) -> Plan:
        """The plan that fits the request; the lowest levels if none does.

        Raises:
            InvalidRequestError: The model cannot serve the request.
        """
        seen = ObservedState(self.encoder, request)
        valid = seen.observation["action_mask"]
        while seen.state.peak_bytes > request.budget_bytes and valid.any():
            scores = np.where(valid, self.scores(seen.observation), -np.inf)
            seen.lower(int(scores.argmax()))
        return seen.state.plan
