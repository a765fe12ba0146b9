"""The item-wise policy network for serving, in NumPy and float32.

It chooses the same plans as the trained network of `agents.networks`, one item per pass, without
torch or stable-baselines3. The inputs of the first layer stay in one array, in which a lowered item
changes few entries; terms that all items share are computed once per pass.

Shapes: N items, F features of an item, V entries of an item's vector, W columns of a row
(`rap_env.ladder.item_rows`), H hidden units. Layers have H + 1 columns here: the last one carries
the linear path of the network past its activations.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rap_env.block_rows import MOST_SPREADS, OVER_FLOOR, SPREAD_FLOOR, shown, width_of
from rap_env.ladder.item_rows import (
    COST_SCALE,
    LEVEL,
    NEIGHBOURS,
    PRICED,
    USEFUL_FLOOR,
    neighbours,
    row_columns,
)
from rap_env.ladder.items import KINDS
from rap_env.ladder.observation import (
    BYTES_OVER,
    FREED,
    ITEM_FEATURES,
    ItemObservationBuilder,
    Observation,
    ObservedState,
    bytes_over,
)
from rap_env.ladder.plan_observer import PlanObserver
from rap_env.plan import Plan
from rap_env.policies.block_network import Floats, NetworkWeights, UpperLayers, standardise
from rap_env.request import Request

_FEATURES = len(ITEM_FEATURES)
_COMPARED = _FEATURES + len(PRICED)
_COSTS = [ITEM_FEATURES.index(name) for name in PRICED]

# The rows of a pass's inputs: features and prices, the same standardised, useful share, validity,
# levels of neighbours. Prices themselves have no weight.
_DEVIATIONS = slice(_COMPARED, 2 * _COMPARED)
_USEFUL, _VALID = 2 * _COMPARED, 2 * _COMPARED + 1
_NEAR = slice(_VALID + 1, _VALID + 1 + len(NEIGHBOURS))

_FEW = 4
"""Items whose entries are faster to update one by one than all at once."""


@dataclass(frozen=True, eq=False)
class ItemNetworkWeights(NetworkWeights):
    """The weights of an item-wise network, with a vector for each item or none."""

    @staticmethod
    def row_width(block_vectors: int) -> int:
        """W, the number of columns of a row."""
        return width_of(row_columns(block_vectors))


class ItemNetwork:
    """Chooses items of one model to lower until a request fits.

    It does not change after construction, so threads may share it.

    Args:
        weights: The trained weights, with vectors for as many items as the ladder has, or none.
        builder: Makes observations of requests on the model.
    """

    def __init__(self, weights: ItemNetworkWeights, builder: ItemObservationBuilder) -> None:
        self.builder = builder
        count = len(builder.ladder)
        parts = {n: weights.first()[c] for n, c in row_columns(weights.block_vectors).items()}
        self._see_request = np.float32("request" not in weights.without)
        self._seen = shown(ITEM_FEATURES, weights.without)
        priced = shown(PRICED, weights.without)[:, None]
        self._compared = parts["compared"].copy()
        self._compared[_FEATURES:] *= priced
        self._upper = UpperLayers(weights)
        prices = np.zeros((len(PRICED), weights.hidden + 1), dtype=np.float32)
        self._varying = np.vstack(
            [parts["items"], prices, self._compared, parts["useful"], parts["valid"],
             parts["neighbours"]]
        )  # fmt: skip
        self._request = parts["request"] * self._see_request
        vectors = weights.vectors if weights.block_vectors else np.zeros((count, 0), np.float32)
        self._own = np.asarray(vectors @ parts["vectors"] + weights.first_offset())
        items = builder.build(Request(1, 1, budget_bytes=1), Plan())["ladder"]
        items = items * self._seen
        kinds = items[:, : len(KINDS)] / np.maximum(items[:, : len(KINDS)].sum(axis=0), 1)
        # What one item at its lowest level adds to the terms that all items share, (N, H + 1).
        self._level = kinds @ parts["mean_level"] + vectors @ parts["lowered_vectors"] / count
        self._lowest = kinds[:, :2] @ parts["lowest"]
        self.near = neighbours(items)
        places = np.arange(len(NEIGHBOURS))[:, None] * count + np.arange(count)
        first = _NEAR.start * count
        self._touched = [first + places[item == self.near.T] for item in range(count)]

    def plan(self, request: Request) -> Plan:
        """The plan that fits the request; the lowest levels if none does.

        Raises:
            InvalidRequestError: The model cannot serve the request.
        """
        builder, budget = self.builder, request.budget_bytes
        costs = builder.item_bytes.costs(request.batch_size, request.seq_len_tokens)
        dense_peak = costs.dense_peak_bytes
        if dense_peak <= budget:
            return Plan()
        state = _Pass(self, request)
        levels = state.levels
        while levels.peak_bytes > budget and state.left:
            state.lower(state.best_item(bytes_over(levels.peak_bytes, budget, dense_peak)))
        return builder.ladder.plan(levels.positions)

    def sample(self, request: Request, count: int, seed: int = 0) -> list[Plan]:
        """Plans that fit the request if any does: the greedy one, then `count` - 1 samples.

        All of them grow in parallel, by one action in each pass of the network.
        """
        observer, rng = PlanObserver(self.builder, [request]), np.random.default_rng(seed)
        state, which = observer.start(count), np.zeros(count, dtype=np.int64)
        grows = np.flatnonzero(observer.over_bytes(which, state))
        while len(grows):
            seen = observer.observe(which[grows], state[grows])
            noise = rng.gumbel(size=state.shape)  # the largest sum is a sample
            noise[0] = 0.0
            scores = np.where(seen["action_mask"] > 0, self.scores(seen) + noise[grows], -np.inf)
            chosen = scores.argmax(axis=1)
            state[grows] = observer.act(which[grows], state[grows], chosen)
            moved = seen["action_mask"].any(axis=1)  # else nothing is left to lower
            grows = grows[moved & (observer.over_bytes(which[grows], state[grows]) > 0)]
        return [observer.plan(row) for row in state]

    def scores(self, seen: Observation) -> Floats:
        """The scores of all items in B observations, (B, N); those of invalid ones mean nothing."""
        items = seen["ladder"] * self._seen
        valid = seen["action_mask"][:, :, None]
        over = seen["request"][:, BYTES_OVER, None, None] * self._see_request
        useful = np.minimum(items[:, :, [FREED]] / (over + np.float32(OVER_FLOOR)), 1) * valid
        prices = items[:, :, _COSTS] * np.float32(COST_SCALE)
        prices = prices - np.log(useful + np.float32(USEFUL_FLOOR))
        values = np.concatenate([items, prices], axis=2)
        left = np.maximum(valid.sum(axis=1, keepdims=True), 1)
        centred = (values - (values * valid).sum(axis=1, keepdims=True) / left) * valid
        spread = np.sqrt(np.square(centred).sum(axis=1, keepdims=True) / left)
        compared = np.clip(
            centred / (spread + np.float32(SPREAD_FLOOR)), -MOST_SPREADS, MOST_SPREADS
        )
        level = items[:, :, LEVEL]
        near = np.append(level, np.zeros_like(level[:, :1]), axis=1)[:, self.near]
        rows = np.concatenate([values, compared, useful, valid, near], axis=2, dtype=np.float32)
        shared = seen["request"] @ self._request + level @ self._level
        shared += (level >= 1).astype(np.float32) @ self._lowest
        return self._upper.scores(rows @ self._varying + self._own + shared[:, None])


class _Pass:
    """The inputs of the network for one request, updated as items are lowered.

    Attributes:
        levels: The current levels and their bytes.
        left: Number of items that have a lower level.
    """

    def __init__(self, network: ItemNetwork, request: Request) -> None:
        self._seen = ObservedState(network.builder, request)
        self.levels = self._seen.state
        self._network = network
        fixed = self._seen.observation["request"].copy()
        fixed[BYTES_OVER] = 0.0  # comes with each pass
        self._shared = fixed @ network._request
        count = len(network.builder.ladder)
        self._inputs: Floats = np.zeros((_NEAR.stop, count), dtype=np.float32)
        self._flat = self._inputs.reshape(-1)
        self._closed: Floats = np.zeros(count, dtype=np.float32)
        self._log_costs: Floats = np.zeros((len(PRICED), count), dtype=np.float32)
        self._by_level: Floats = np.zeros_like(self._shared)
        self.left = count
        self._copy_all()

    def best_item(self, over: float) -> int:
        """The item with the highest score.

        Args:
            over: Bytes over the budget as a share of the native peak.
        """
        network, inputs = self._network, self._inputs
        seen_over = np.float32(over)
        useful, values = inputs[_USEFUL], inputs[:_COMPARED]
        divisor = seen_over * network._see_request + np.float32(OVER_FLOOR)
        np.divide(inputs[FREED], divisor, out=useful)
        np.minimum(useful, np.float32(1.0), out=useful)
        logs = np.log(useful + np.float32(USEFUL_FLOOR))
        np.subtract(self._log_costs, logs, out=values[_FEATURES:])
        standardise(values, inputs[_VALID], np.float32(self.left), inputs[_DEVIATIONS])
        hidden = inputs.T @ network._varying
        hidden += network._own
        hidden += self._shared + seen_over * network._request[BYTES_OVER] + self._by_level
        scores = network._upper.scores(hidden)
        scores += self._closed
        return int(scores.argmax())

    def lower(self, item: int) -> None:
        """Lower an item that has a lower level."""
        changed = self._seen.lower(item)
        if len(changed) > _FEW:
            self._copy_all()
            return
        network, inputs, seen = self._network, self._inputs, self._seen.observation
        for one in changed:
            before = inputs[LEVEL, one]
            row = seen["ladder"][one] * network._seen
            inputs[:_FEATURES, one] = row
            self._log_costs[:, one] = row[_COSTS] * np.float32(COST_SCALE)
            self._flat[network._touched[one]] = row[LEVEL]
            by_level = (row[LEVEL] - before) * network._level[one]
            if row[LEVEL] >= 1 > before:
                by_level = by_level + network._lowest[one]
            self._by_level = self._by_level + by_level
            if inputs[_VALID, one] and not seen["action_mask"][one]:
                inputs[_VALID, one] = 0.0
                self._closed[one] = -np.inf
                self.left -= 1

    def _copy_all(self) -> None:
        """Take over the whole observation."""
        network, inputs, seen = self._network, self._inputs, self._seen.observation
        inputs[:_FEATURES] = (seen["ladder"] * network._seen).T
        inputs[_VALID] = seen["action_mask"]
        level = inputs[LEVEL]
        inputs[_NEAR] = np.append(level, np.float32(0.0))[network.near.T]
        np.multiply(inputs[_COSTS], np.float32(COST_SCALE), out=self._log_costs)
        self._by_level = level @ network._level
        self._by_level += (level >= 1).astype(np.float32) @ network._lowest
        self._closed[seen["action_mask"] == 0] = -np.inf
        self.left = int(seen["action_mask"].sum())
