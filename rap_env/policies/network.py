"""The policy network for serving, in NumPy and float32, and the policy that follows it.

It chooses the same plans as the trained network of `agents.networks`, one action per pass, without
torch or stable-baselines3. The inputs of the first layer stay in one array, in which a lowered item
changes few entries; terms that all rows share are computed once per pass.

Shapes: N rows, of blocks or of items; F observed features of each, V entries of a row's vector, W
columns of a row (`rap_env.policies.network_rows`), H hidden units. Layers have H + 1 columns here:
the last one carries the linear path of the network past its activations.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from rap_env.errors import ArtifactError
from rap_env.ladder.features import BYTES_OVER, bytes_over
from rap_env.ladder.observation import ObservationEncoder, ObservedState
from rap_env.plan import Plan
from rap_env.policies.network_rows import (
    MOST_SPREADS,
    OVER_FLOOR,
    ROWS,
    SPREAD_FLOOR,
    RowSpec,
)
from rap_env.request import Request

Floats = npt.NDArray[np.float32]

_FEW = 4
"""Rows whose entries are faster to update one by one than all at once."""


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

    first_weight: Floats
    first_bias: Floats
    second_weight: Floats
    second_bias: Floats
    last_weight: Floats
    linear_weight: Floats
    vectors: Floats
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
    def hidden(self) -> int:
        """H, the number of hidden units."""
        return len(self.first_bias)

    @property
    def vector_width(self) -> int:
        """V, the width of a row's vector."""
        return int(self.vectors.shape[1]) if self.vectors.ndim == 2 else 0

    def arrays(self) -> dict[str, Floats]:
        """The arrays by name."""
        names = [entry.name for entry in fields(self)]
        return {name: vars(self)[name] for name in names if name not in ("rows", "without")}


class _UpperLayers:
    """The layers above the first one; the last of the H + 1 columns is the linear path."""

    def __init__(self, weights: NetworkWeights) -> None:
        hidden = weights.hidden
        self._second = np.zeros((hidden + 1, hidden + 1), dtype=np.float32)
        self._second[:hidden, :hidden] = weights.second_weight.T
        self._second[hidden, hidden] = 1.0
        self._second_bias = np.append(weights.second_bias, np.float32(0.0))
        self._last = np.append(weights.last_weight, np.float32(1.0))
        # Minus infinity for the linear path, which has no activation.
        self._floor = np.append(np.zeros(hidden, np.float32), np.float32(-np.inf))

    def scores(self, hidden: Floats) -> Floats:
        """The scores, (N,), of first-layer sums, (N, H + 1), which are changed."""
        np.maximum(hidden, self._floor, out=hidden)
        hidden = hidden @ self._second
        hidden += self._second_bias
        np.maximum(hidden, self._floor, out=hidden)
        return np.asarray(hidden @ self._last)


class PolicyNetwork:
    """Chooses what to lower on one model until a request fits.

    It does not change after construction, so threads may share it.

    Args:
        weights: The trained weights, with a vector for each item of the ladder, or none.
        encoder: Encodes observations of requests on the model.
    """

    def __init__(self, weights: NetworkWeights, encoder: ObservationEncoder) -> None:
        self.encoder, self.spec = encoder, weights.spec
        spec, count = self.spec, len(encoder.ladder)
        num_features, num_prices = len(spec.features), len(spec.priced)
        compared = num_features + num_prices
        # The rows of a pass's inputs: features, prices (without a weight), the same standardised,
        # useful share, validity, levels of neighbours.
        self.features = slice(0, num_features)
        self.compared = slice(0, compared)
        self.prices = slice(num_features, compared)
        self.deviations = slice(compared, 2 * compared)
        self.useful, self.valid = 2 * compared, 2 * compared + 1
        self.near = slice(self.valid + 1, self.valid + 1 + spec.num_neighbours)
        first = np.vstack([weights.first_weight, weights.linear_weight]).T  # (W, H + 1)
        parts = {name: first[c] for name, c in spec.columns(weights.vector_width).items()}
        self.shown, shown_prices = spec.shown(weights.without)
        self.see_request = np.float32("request" not in weights.without)
        self.upper = _UpperLayers(weights)
        near, own = parts["neighbours"], np.append(weights.first_bias, np.float32(0.0))
        if spec.of_blocks:  # whether they are kept is 1 minus their level, which is 0 without one
            near, own = -near, own + near.sum(axis=0)
        varying = parts["compared"].copy()
        varying[num_features:] *= shown_prices[:, None]
        no_prices = np.zeros((num_prices, weights.hidden + 1), dtype=np.float32)
        self.varying = np.vstack(
            [parts["features"], no_prices, varying, parts["useful"], parts["valid"], near]
        )
        self.request = parts["request"] * self.see_request
        self.mean_valid = parts["mean_valid"]
        vectors = weights.vectors if weights.vector_width else np.zeros((count, 0), np.float32)
        self.own = np.asarray(vectors @ parts["vectors"] + own, dtype=np.float32)
        rows = encoder.build(Request(1, 1, budget_bytes=1), Plan())[spec.key] * self.shown
        self.near_numbers = spec.neighbours(rows)
        places = np.arange(spec.num_neighbours)[:, None] * count + np.arange(count)
        start = self.near.start * count
        self.touched = [start + places[item == self.near_numbers.T] for item in range(count)]
        kinds = np.stack(spec.kinds(rows), axis=1)
        kinds /= np.maximum(kinds.sum(axis=0), 1)
        # What one row at its lowest level adds to the terms that all rows share, (N, H + 1).
        self.level = kinds @ parts["mean_level"]
        self.lowest = kinds[:, : len(parts["lowest"])] @ parts["lowest"]
        self.mean_lowest = np.zeros_like(self.level)
        if spec.of_blocks:
            lowest = encoder.build(Request(1, 1, budget_bytes=1), encoder.ladder.lowest)[spec.key]
            self.mean_lowest = (lowest * self.shown) @ parts["mean_lowest"]
            self.mean_lowest += vectors @ parts["lowered_vectors"]
        else:
            self.level += vectors @ parts["lowered_vectors"] / np.float32(count)

    def plan(self, request: Request) -> Plan:
        """The plan that fits the request; the lowest levels if none does.

        Raises:
            InvalidRequestError: The model cannot serve the request.
        """
        costs = self.encoder.ladder_bytes.costs(request.batch_size, request.seq_len_tokens)
        budget, dense_peak = request.budget_bytes, costs.dense_peak_bytes
        if dense_peak <= budget:
            return Plan()
        state = _Pass(self, request)
        levels = state.levels
        while levels.peak_bytes > budget and state.num_valid:
            state.lower(state.best_row(bytes_over(levels.peak_bytes, budget, dense_peak)))
        return levels.plan


class _Pass:
    """The inputs of the network for one request, updated as rows are lowered.

    Attributes:
        levels: The current levels and their bytes.
        num_valid: Number of rows that have a lower level.
    """

    def __init__(self, network: PolicyNetwork, request: Request) -> None:
        self._seen = ObservedState(network.encoder, request)
        self.levels = self._seen.state
        self._network = network
        fixed = self._seen.observation["request"].copy()
        fixed[BYTES_OVER] = 0.0  # comes with each pass
        self._shared = fixed @ network.request
        count = len(network.encoder.ladder)
        self._inputs: Floats = np.zeros((network.near.stop, count), dtype=np.float32)
        self._flat = self._inputs.reshape(-1)
        self._closed: Floats = np.zeros(count, dtype=np.float32)
        self._log_costs: Floats = np.zeros((len(network.spec.priced), count), dtype=np.float32)
        self._level: Floats = np.zeros(count, dtype=np.float32)
        self._by_level: Floats = np.zeros_like(self._shared)
        self._mean_lowest: Floats = np.zeros_like(self._shared)
        self._num_lowest = 0
        self.num_valid = count
        self._copy_all()

    def best_row(self, over: float) -> int:
        """The row with the highest score.

        Args:
            over: Bytes over the budget as a share of the native peak.
        """
        network, inputs = self._network, self._inputs
        seen_over = np.float32(over)
        useful = inputs[network.useful]
        divisor = seen_over * network.see_request + np.float32(OVER_FLOOR)
        np.divide(inputs[network.spec.freed], divisor, out=useful)
        np.minimum(useful, np.float32(1.0), out=useful)
        logs = np.log(useful + np.float32(network.spec.useful_floor))
        np.subtract(self._log_costs, logs, out=inputs[network.prices])
        mean = _standardise(
            inputs[network.compared],
            inputs[network.valid],
            np.float32(self.num_valid),
            inputs[network.deviations],
        )
        shared = self._shared + seen_over * network.request[BYTES_OVER] + self._by_level
        if network.spec.of_blocks:
            shared += mean[network.features] @ network.mean_valid
            if self._num_lowest:
                shared += self._mean_lowest / np.float32(self._num_lowest)
        hidden = inputs.T @ network.varying
        hidden += network.own
        hidden += shared
        scores = network.upper.scores(hidden)
        scores += self._closed
        return int(scores.argmax())

    def lower(self, row: int) -> None:
        """Lower a row that has a lower level."""
        changed = self._seen.lower(row)
        if len(changed) > _FEW:
            self._copy_all()
            return
        network, inputs, observation = self._network, self._inputs, self._seen.observation
        spec, valid = network.spec, observation["action_mask"]
        for number in changed:
            features = observation[spec.key][number] * network.shown
            inputs[network.features, number] = features
            before, level = self._level[number], spec.level(features, valid[number])
            self._level[number] = level
            self._flat[network.touched[number]] = level
            self._by_level = self._by_level + (level - before) * network.level[number]
            if level >= 1 > before:
                self._by_level = self._by_level + network.lowest[number]
                self._mean_lowest = self._mean_lowest + network.mean_lowest[number]
                self._num_lowest += 1
            if valid[number]:
                self._log_costs[:, number] = spec.log_costs(features[spec.costs], np.log)
            elif inputs[network.valid, number]:
                inputs[network.valid, number] = 0.0
                self._closed[number] = -np.inf
                self.num_valid -= 1

    def _copy_all(self) -> None:
        """Take over the whole observation."""
        network, inputs, observation = self._network, self._inputs, self._seen.observation
        spec, valid = network.spec, observation["action_mask"]
        rows = observation[spec.key] * network.shown
        inputs[network.features] = rows.T
        inputs[network.valid] = valid
        self._level = level = spec.level(rows, valid)
        inputs[network.near] = np.append(level, np.float32(0.0))[network.near_numbers.T]
        self._log_costs[:] = spec.log_costs(rows[:, spec.costs].T, np.log)
        lowest = (level >= 1).astype(np.float32)
        self._by_level = level @ network.level + lowest @ network.lowest
        self._mean_lowest = lowest @ network.mean_lowest
        self._num_lowest = int(lowest.sum())
        self._closed[valid == 0] = -np.inf
        self.num_valid = int(valid.sum())


def _standardise(values: Floats, counted: Floats, left: np.float32, out: Floats) -> Floats:
    """Write clipped deviations from the mean over some columns, in units of their spread.

    Args:
        values: A row for each feature, (F, N).
        counted: 1 for columns that count, else 0, (N,).
        left: Number of columns that count.
        out: Takes the deviations of all columns, (F, N).

    Returns:
        The means, (F,).
    """
    mean = values @ counted
    mean /= left
    np.subtract(values, mean[:, None], out=out)
    spread = np.square(out) @ counted
    spread /= left
    np.sqrt(spread, out=spread)
    spread += np.float32(SPREAD_FLOOR)
    out /= spread[:, None]
    np.minimum(out, np.float32(MOST_SPREADS), out=out)
    np.maximum(out, np.float32(-MOST_SPREADS), out=out)
    return np.asarray(mean)
