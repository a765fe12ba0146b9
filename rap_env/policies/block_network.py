"""The block-wise policy network for serving, in NumPy and float32.

It chooses the same blocks as the trained network of `agents.networks`, one block per pass, without
torch or stable-baselines3. A pass is cheap because of the first layer: the terms that no removal
changes are computed once per model or request, the terms that all blocks share once per pass, and
only the rest per block.

Shapes: 2L blocks, F features of a block, V entries of a block's vector, W columns of a row
(`rap_env.block_rows`), H hidden units. Layers have H + 1 columns here: the last one carries the
linear path of the network past its activations.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from rap_env.block_rows import (
    ABLATIONS,
    IMPORTANCE_FLOOR,
    MOST_SPREADS,
    NEIGHBOURS,
    OVER_FLOOR,
    PRICED,
    SPREAD_FLOOR,
    USEFUL_FLOOR,
    row_columns,
    row_width,
    shown,
)
from rap_env.costs import request_costs
from rap_env.errors import ArtifactError
from rap_env.ladder.observation import (
    BLOCK_FEATURES,
    BYTES_OVER,
    KEPT_AND_FREED,
    ObservationBuilder,
    bytes_over,
)
from rap_env.plan import Plan
from rap_env.request import Request

Floats = npt.NDArray[np.float32]


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
        vectors: Learned vector of each block, (2L, V); V = 0 for a network that serves any L.
        without: Names from `rap_env.block_rows.ABLATIONS`.

    Raises:
        ArtifactError: The shapes do not fit together, a weight is not finite, or there is no
            such ablation.
    """

    first_weight: Floats
    first_bias: Floats
    second_weight: Floats
    second_bias: Floats
    last_weight: Floats
    linear_weight: Floats
    vectors: Floats
    without: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        hidden, width = self.hidden, self.row_width(self.block_vectors)
        expected = {
            "first_weight": (hidden, width),
            "first_bias": (hidden,),
            "second_weight": (hidden, hidden),
            "second_bias": (hidden,),
            "last_weight": (hidden,),
            "linear_weight": (width,),
        }
        for name, shape in expected.items():
            found = getattr(self, name).shape
            if found != shape:
                raise ArtifactError(
                    f"The policy network's {name} must have the shape {shape}, not {found}; its "
                    "file was written by another version, so export the policy again."
                )
        for name, array in self.arrays().items():
            if not np.isfinite(array).all():
                raise ArtifactError(
                    f"The policy network's {name} contains NaN or infinity; train it again."
                )
        for name in self.without:
            if name not in ABLATIONS:
                raise ArtifactError(
                    f"The policy network was trained without {name!r}, which is unknown to this "
                    f"version (known: {', '.join(ABLATIONS)}); upgrade rap-env."
                )

    @staticmethod
    def row_width(block_vectors: int) -> int:
        """W, the number of columns of a row."""
        return row_width(block_vectors)

    @property
    def hidden(self) -> int:
        """H, the number of hidden units."""
        return len(self.first_bias)

    @property
    def block_vectors(self) -> int:
        """V, the width of a block's vector."""
        return int(self.vectors.shape[1]) if self.vectors.ndim == 2 else 0

    def arrays(self) -> dict[str, Floats]:
        """The arrays by name."""
        names = [entry.name for entry in fields(self) if entry.name != "without"]
        return {name: getattr(self, name) for name in names}

    def first(self) -> Floats:
        """The first layer with the linear path as its last column, (W, H + 1)."""
        return np.vstack([self.first_weight, self.linear_weight]).T

    def first_offset(self) -> Floats:
        """The bias of the first layer; none for the linear path, (H + 1,)."""
        return np.append(self.first_bias, np.float32(0.0))


class UpperLayers:
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
        """The scores, (...), of first-layer sums, (..., H + 1), which are changed."""
        np.maximum(hidden, self._floor, out=hidden)
        hidden = hidden @ self._second
        hidden += self._second_bias
        np.maximum(hidden, self._floor, out=hidden)
        return np.asarray(hidden @ self._last)


def standardise(values: Floats, counted: Floats, left: np.float32, out: Floats) -> Floats:
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


_FREED = BLOCK_FEATURES.index("freed_share")
_FEATURES = len(BLOCK_FEATURES)
_COMPARED = _FEATURES + len(PRICED)


class _Layers(NamedTuple):
    """The first layer in the layout of a pass; the last of its columns is the linear path."""

    varying: Floats  # of a block's compared features and useful share, (F + prices + 1, H + 1)
    over: Floats  # of the share of the bytes over budget, (H + 1,)
    mean_kept: Floats  # (F, H + 1)
    near: Floats  # of each neighbour, (4, H + 1)


class BlockNetwork:
    """Chooses blocks of one model to remove until a request fits.

    It does not change after construction, so threads may share it.

    Args:
        weights: The trained weights, with vectors for as many blocks as the model has, or none.
        builder: Makes observations of requests on the model.
    """

    def __init__(self, weights: NetworkWeights, builder: ObservationBuilder) -> None:
        self._builder = builder
        self._count = builder.memory.facts.num_blocks
        first = weights.first()
        parts = {n: first[c] for n, c in row_columns(weights.block_vectors).items()}
        self._upper = UpperLayers(weights)
        self._see_request = "request" not in weights.without
        self._seen = shown(BLOCK_FEATURES, weights.without)
        self._layers = _layers(weights, parts)
        self._request_weight = parts["request"] * self._see_request
        self._freed_weight = parts["blocks"][_FREED] * self._see_request
        blocks = builder.build(Request(1, 1, budget_bytes=1), Plan())["blocks"] * self._seen
        blocks[:, _FREED] = 0.0
        self._columns = np.ascontiguousarray(blocks.T)  # (F, 2L), all but what a request frees
        priced = [BLOCK_FEATURES.index(name) for name in PRICED]
        self._log_importance = np.log(self._columns[priced] + np.float32(IMPORTANCE_FLOOR))
        vectors = weights.vectors if weights.block_vectors else blocks[:, :0]
        self._own = _own_part(weights, parts, blocks, vectors)
        self._removed = _removed_part(parts, blocks, vectors)
        self._removed_kind = _removed_kind_part(parts, blocks)

    def removals(self, request: Request) -> list[int]:
        """The blocks to remove until the request fits, in order; all if it never fits."""
        costs = request_costs(self._builder.memory, request.batch_size, request.seq_len_tokens)
        budget, dense_peak = request.budget_bytes, costs.dense_peak_bytes
        removed: list[int] = []
        if dense_peak <= budget:
            return removed
        tracker, state = costs.tracker(), _Pass(self, request)
        while tracker.peak_bytes > budget and len(removed) < self._count:
            index = state.best_block(bytes_over(tracker.peak_bytes, budget, dense_peak))
            state.remove(index)
            tracker.remove(index)
            removed.append(index)
        return removed


class _Pass:
    """The inputs of the network for one request, updated as blocks are removed."""

    def __init__(self, network: BlockNetwork, request: Request) -> None:
        seen, count = network._builder.build(request, Plan()), network._count
        freed = seen["blocks"][:, _FREED] * np.float32(network._see_request)
        fixed = seen["request"].copy()
        fixed[BYTES_OVER] = 0.0  # comes with each pass
        self._network, self._layers = network, network._layers
        self._freed: Floats = freed
        self._values: Floats = np.empty((_COMPARED, count), dtype=np.float32)
        self._values[:_FEATURES] = network._columns
        self._values[_FREED] = freed
        self._varying: Floats = np.empty((_COMPARED + 1, count), dtype=np.float32)
        self._own = network._own + freed[:, None] * network._freed_weight
        self._shared = fixed @ network._request_weight
        self._removed: Floats = np.zeros_like(self._shared)
        self._kept: Floats = np.ones(count, dtype=np.float32)
        self._closed: Floats = np.zeros(count, dtype=np.float32)
        self._left = count

    def best_block(self, over: float) -> int:
        """The kept block with the highest score.

        Args:
            over: Bytes over the budget as a share of the dense peak.
        """
        layers = self._layers
        seen_over = np.float32(over) if self._network._see_request else np.float32(0.0)
        mean = self._compare(seen_over)
        shared = self._shared + seen_over * layers.over + mean[:_FEATURES] @ layers.mean_kept
        if self._left < len(self._kept):
            shared += self._removed / np.float32(len(self._kept) - self._left)
        hidden = self._varying.T @ layers.varying
        hidden += self._own
        hidden += shared
        scores = self._network._upper.scores(hidden)
        scores += self._closed
        return int(scores.argmax())

    def remove(self, index: int) -> None:
        """Remove block `index`."""
        network = self._network
        self._kept[index] = 0.0
        self._closed[index] = -np.inf
        self._left -= 1
        self._removed += network._removed[index]
        self._shared = self._shared + network._removed_kind[index]
        for step, weight in zip(NEIGHBOURS, self._layers.near, strict=True):
            if 0 <= index - step < len(self._kept):  # it is the neighbour of that block
                self._own[index - step] -= weight

    def _compare(self, over: np.float32) -> Floats:
        """Update the inputs that each removal changes for all blocks.

        Args:
            over: Bytes over the budget as a share of the dense peak; 0 if hidden from the network.

        Returns:
            Means of the features and prices over the kept blocks, (F + prices,).
        """
        values, useful = self._values, self._varying[-1]
        np.divide(self._freed, over + np.float32(OVER_FLOOR), out=useful)
        np.minimum(useful, np.float32(1.0), out=useful)
        logs = np.log(useful + np.float32(USEFUL_FLOOR))
        np.subtract(self._network._log_importance, logs, out=values[_FEATURES:])
        return standardise(values, self._kept, np.float32(self._left), self._varying[:-1])


def _layers(weights: NetworkWeights, parts: dict[str, Floats]) -> _Layers:
    compared = parts["compared"].copy()
    compared[_FEATURES:] *= shown(PRICED, weights.without)[:, None]
    return _Layers(
        varying=np.vstack([compared, parts["useful"]]),
        over=parts["request"][BYTES_OVER].copy(),
        mean_kept=parts["mean_kept"].copy(),
        near=parts["neighbours"].copy(),
    )


def _own_part(
    weights: NetworkWeights, parts: dict[str, Floats], blocks: Floats, vectors: Floats
) -> Floats:
    """First-layer terms of each kept block with kept neighbours, for no request, (2L, H + 1)."""
    always = parts["kept"][0] + parts["neighbours"].sum(axis=0) + weights.first_offset()
    own = blocks @ parts["blocks"] + vectors @ parts["vectors"] + always
    return np.asarray(own, dtype=np.float32)


def _removed_part(parts: dict[str, Floats], blocks: Floats, vectors: Floats) -> Floats:
    """First-layer terms of each block as the only removed one, (2L, H + 1)."""
    blocks = blocks.copy()
    blocks[:, KEPT_AND_FREED] = 0.0
    removed = blocks @ parts["mean_removed"] + vectors @ parts["removed_vectors"]
    return np.asarray(removed, dtype=np.float32)


def _removed_kind_part(parts: dict[str, Floats], blocks: Floats) -> Floats:
    """First-layer terms of one more removed block of each block's kind, (2L, H + 1)."""
    ffn = blocks[:, BLOCK_FEATURES.index("kind")]
    kinds = np.stack([1 - ffn, ffn], axis=1)
    shares = kinds / np.maximum(kinds.sum(axis=0), 1)
    return np.asarray(shares @ parts["removed_by_kind"], dtype=np.float32)
