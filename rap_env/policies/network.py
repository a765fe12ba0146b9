"""The policy network for serving, in NumPy and float32, and the policy that follows it.

It chooses the same plans as the trained network of `agents.networks`, one action per pass,
without torch or stable-baselines3. The inputs of the first layer stay in one array, in which
a lowered item changes few entries; terms that all rows share are computed once per pass.

Shapes: N rows, of blocks or of items; F observed features of each, V entries of a row's
vector, W columns of a row (`rap_env.policies.network_rows`), H hidden units. Layers have H +
1 columns here: the last one carries the linear path of the network past its activations.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from rap_env.errors import ArtifactError
from rap_env.ladder.features import BYTES_OVER, bytes_over
from rap_env.ladder.observation import ObservationEncoder, ObservedState
from rap_env.plan import Plan
from rap_env.policies.network_rows import MOST_SPREADS, OVER_FLOOR, ROWS, SPREAD_FLOOR, RowSpec
from rap_env.request import Request

Float32s = npt.NDArray[np.float32]


_ONE, _OVER_FLOOR = np.float32(1.0), np.float32(OVER_FLOOR)
_SPREAD_FLOOR, _MOST_SPREADS = np.float32(SPREAD_FLOOR), np.float32(MOST_SPREADS)

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
    def hidden(self) -> int:
        """H, the number of hidden units."""
        return len(self.first_bias)

    @property
    def vector_width(self) -> int:
        """V, the width of a row's vector."""
        return int(self.vectors.shape[1]) if self.vectors.ndim == 2 else 0

    def arrays(self) -> dict[str, Float32s]:
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

    def scores(self, hidden: Float32s) -> Float32s:
        """The scores, (N,), of first-layer sums, (N, H + 1), which are changed."""
        np.maximum(hidden, self._floor, out=hidden)
        hidden = hidden @ self._second
        hidden += self._second_bias
        np.maximum(hidden, self._floor, out=hidden)
        return np.asarray(hidden @ self._last)


class PolicyNetwork:
    """Chooses what to lower on one model until a request fits.

    It does not change after construction, so threads may share it. The inputs of a pass have
    a column for each block or item. Their rows are features, prices, both of them
    standardised, the useful share, whether there is a lower level, and the levels of the
    neighbours. Prices have no weight of their own; they are standardised together with the
    features.

    The first layer is a sum over the parts of a row (`RowSpec.columns`); each part is
    computed where it changes:

    | part of a row | here | changes |
    |---|---|---|
    | features, compared, useful, valid, neighbours | `varying` x inputs | with each pass |
    | vectors, biases | `own` | never |
    | request | `request` | once per request, its bytes over budget with each pass |
    | mean_valid | `mean_valid` x mean of the features | with each pass |
    | the others, which sum levels | `level_weights` x `levels` x levels | with each lowered item |

    Args:
        weights: The trained weights, with a vector for each item of the ladder, or none.
        encoder: Encodes observations of requests on the model.
    """

    def __init__(self, weights: NetworkWeights, encoder: ObservationEncoder) -> None:
        self.encoder, self.spec = encoder, weights.spec
        spec, count = self.spec, len(encoder.ladder)
        features = len(spec.features)
        compared = features + len(spec.priced)
        self.features, self.prices = slice(0, features), slice(features, compared)
        self.compared, self.deviations = slice(0, compared), slice(compared, 2 * compared)
        self.useful, self.valid, self.near = 2 * compared, 2 * compared + 1, 2 * compared + 2
        self.shown, shown_prices = spec.shown(weights.without)
        self.useful_floor = np.float32(spec.useful_floor)
        self.see_request = np.float32("request" not in weights.without)
        self.upper = _UpperLayers(weights)
        first = np.vstack([weights.first_weight, weights.linear_weight]).T  # (W, H + 1)
        parts = {name: first[c] for name, c in spec.columns(weights.vector_width).items()}
        vectors = weights.vectors if weights.vector_width else np.zeros((count, 0), np.float32)
        near, bias = parts["neighbours"], np.append(weights.first_bias, np.float32(0.0))
        if spec.near_kept:  # 1 minus their level, which is 0 where there is none
            near, bias = -near, bias + near.sum(axis=0)
        shown_compared = np.append(np.ones_like(self.shown), shown_prices)
        self.varying = np.vstack(
            [
                parts["features"],
                np.zeros((len(spec.priced), len(bias)), dtype=np.float32),
                parts["compared"] * shown_compared[:, None],
                parts["useful"],
                parts["valid"],
                near,
            ]
        )
        self.own = np.asarray(vectors @ parts["vectors"] + bias, dtype=np.float32)
        self.request = parts["request"] * self.see_request
        self.mean_valid = parts["mean_valid"]
        native, lowest = (
            encoder.build(Request(1, 1, budget_bytes=1), plan)[spec.key] * self.shown
            for plan in (Plan(), encoder.ladder.lowest)
        )
        self.near_numbers = spec.neighbours(native).T
        self.levels = _level_sums(spec, native, lowest, vectors)
        names = ("mean_level", "mean_lowest", "lowest", "lowered_vectors")
        self.level_weights = np.vstack([parts[name] for name in names])

    def can_fit(self, request: Request) -> bool:
        """Whether the request fits with every item lowered as far as possible."""
        costs = self.encoder.ladder_bytes.costs(request.batch_size, request.seq_len_tokens)
        return costs.least_peak_bytes <= request.budget_bytes

    def plan(self, request: Request) -> Plan:
        """The plan that fits the request; the lowest levels if none does.

        Raises:
            InvalidRequestError: The model cannot serve the request.
        """
        costs = self.encoder.ladder_bytes.costs(request.batch_size, request.seq_len_tokens)
        budget, native_peak = request.budget_bytes, costs.native_peak_bytes
        if native_peak <= budget:
            return Plan()
        state = _Pass(self, request)
        levels = state.levels
        while levels.peak_bytes > budget and state.num_valid:
            state.lower(state.best_row(bytes_over(levels.peak_bytes, budget, native_peak)))
        return levels.plan


def _level_sums(spec: RowSpec, native: Float32s, lowest: Float32s, vectors: Float32s) -> Float32s:
    """What the parts of a row that sum levels are per level of each row, and if it is the lowest.

    Args:
        spec: What rows are made of.
        native: The features of the native model, (N, F).
        lowest: Those with each row at its lowest level, (N, F).
        vectors: The learned vectors, (N, V).

    Returns:
        N rows for the levels, then N for whether they are the lowest, with the columns of a
        row.
    """
    kinds = np.stack(spec.kinds(native), axis=1)
    kinds /= np.maximum(kinds.sum(axis=0), 1)
    at_lowest = [lowest[:, : lowest.shape[1] * spec.means], kinds[:, : spec.lowest_kinds]]
    divisor = np.float32(np.inf if spec.means else len(native))
    by_level = [kinds, *map(np.zeros_like, at_lowest), vectors / divisor]
    by_lowest = [np.zeros_like(kinds), *at_lowest, vectors * np.float32(spec.means)]
    return np.vstack([np.hstack(by_level), np.hstack(by_lowest)])


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
        self._request = fixed @ network.request
        count = len(network.encoder.ladder)
        self._inputs: Float32s = np.zeros((len(network.varying), count), dtype=np.float32)
        self._levels: Float32s = np.zeros(2 * count + 1, dtype=np.float32)
        self._level, self._lowest = self._levels[:count], self._levels[count:-1]
        self._take(slice(None))
        self._sum_levels()

    def best_row(self, over: float) -> int:
        """The row with the highest score.

        Args:
            over: Bytes over the budget as a share of the native peak.
        """
        network, inputs = self._network, self._inputs
        seen_over, valid = np.float32(over), inputs[network.valid]
        useful = inputs[network.useful]
        divisor = seen_over * network.see_request + _OVER_FLOOR
        np.divide(inputs[network.spec.freed], divisor, out=useful)
        np.minimum(useful, _ONE, out=useful)
        log_costs = network.spec.log_costs(inputs[network.spec.costs], np.log)
        np.subtract(log_costs, np.log(useful + network.useful_floor), out=inputs[network.prices])
        mean = _standardise(
            inputs[network.compared],
            valid,
            np.float32(self.num_valid),
            inputs[network.deviations],
        )
        shared = self._request + seen_over * network.request[BYTES_OVER] + self._by_level
        if network.spec.means:
            shared += mean[network.features] @ network.mean_valid
        hidden = inputs.T @ network.varying
        hidden += network.own
        hidden += shared
        scores = network.upper.scores(hidden)
        np.putmask(scores, valid == 0, -np.inf)
        return int(scores.argmax())

    def lower(self, row: int) -> None:
        """Lower a row that has a lower level."""
        changed = self._seen.lower(row)
        for number in changed if len(changed) <= _FEW else (slice(None),):
            self._take(number)
        self._sum_levels()

    def _take(self, rows: int | slice) -> None:
        """Take over what is observed of one row, or of all."""
        network, observation = self._network, self._seen.observation
        features = observation[network.spec.key][rows] * network.shown
        self._inputs[network.features, rows] = features.T
        self._inputs[network.valid, rows] = observation["action_mask"][rows]

    def _sum_levels(self) -> None:
        """Compute what all levels together determine."""
        network, inputs = self._network, self._inputs
        self.num_valid = np.count_nonzero(inputs[network.valid])
        self._level[:] = network.spec.level(inputs[network.features].T)
        # -1: none.
        self._levels.take(network.near_numbers, out=inputs[network.near :], mode="wrap")
        np.greater_equal(self._level, 1, out=self._lowest)
        if network.spec.means:
            self._lowest /= max(1.0, float(self._lowest.sum()))
        self._by_level = self._levels[:-1] @ network.levels @ network.level_weights


def _standardise(values: Float32s, counted: Float32s, left: np.float32, out: Float32s) -> Float32s:
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
    spread += _SPREAD_FLOOR
    out /= spread[:, None]
    np.minimum(out, _MOST_SPREADS, out=out)
    np.maximum(out, -_MOST_SPREADS, out=out)
    return np.asarray(mean)
