"""Observations of a request and of a plan on a ladder. No model is run.

An observation is a dict of arrays: ``request``, a row for each item under `ObservationEncoder.key`,
and ``action_mask``. Both tasks and the runtime's policies use the same encoder; `RAPPrune` and
`RAPLadder` differ in the columns of a row. Without torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from rap_env.ladder.items import KINDS, Counts, Ladder, LevelSteps
from rap_env.ladder.ladder_bytes import LadderBytes, mask_bytes
from rap_env.ladder.state import LadderState, Lowering
from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.request import Request

if TYPE_CHECKING:
    from gymnasium import spaces

REQUEST_FEATURES = ("budget", "batch_size", "seq_len", "bytes_over", "kv_share")
"""Columns of ``request``."""

BYTES_OVER = REQUEST_FEATURES.index("bytes_over")
"""The column of ``request`` that depends on the plan."""

MAX_BATCH_LOG2 = 8
"""A batch of 256 or more sequences is observed as 1.0."""

BLOCK_FEATURES = (
    "kind", "depth", "kept", "freed_share", "one_shot_loss", "gsi_rank", "gsi_marginal_loss",
)  # fmt: skip
"""Columns of a block's row, ``blocks``."""

ITEM_FEATURES = (
    *KINDS, "depth", "level", "freed_share", "one_shot_cost", "order_place", "order_cost",
)  # fmt: skip
"""Columns of an item's row, ``ladder``."""

COST_FLOOR, COST_CEILING = 1e-4, 10.0
"""Costs in nats per token that are observed as about 0 and as 1, on a log scale between."""

Observation = dict[str, npt.NDArray[Any]]
Floats = npt.NDArray[np.float32]

_CACHED_ROWS = 64
_CACHED_SHAPES = 2048  # a few kilobytes each

_FEW = 8
"""Rows of an observation that are faster to update one by one than all at once."""


@dataclass(frozen=True, eq=False)
class ImportanceFeatures:
    """Importance of the 2L blocks as arrays, as an agent observes it.

    Attributes:
        one_shot: ΔNLL of removing only this block, nats per token, (2L,).
        gsi_rank: Position in the GSI order, 0 = removed first, 1 = last, (2L,).
        gsi_marginal_loss: ΔNLL added by its removal in that order, nats per token, (2L,).
    """

    one_shot: npt.NDArray[np.float64]
    gsi_rank: npt.NDArray[np.float64]
    gsi_marginal_loss: npt.NDArray[np.float64]

    @classmethod
    def none(cls, num_blocks: int) -> ImportanceFeatures:
        """Zeros: the agent observes no importance."""
        zeros = np.zeros(num_blocks)
        return cls(zeros, zeros, zeros)

    @classmethod
    def from_one_shot(cls, delta_nll: npt.NDArray[np.float64]) -> ImportanceFeatures:
        """The one-shot order in place of the GSI order, if GSI was not run."""
        rank = np.argsort(np.argsort(delta_nll, kind="stable")) / max(1, len(delta_nll) - 1)
        return cls(delta_nll, rank, delta_nll)


@dataclass(frozen=True, eq=False)
class ItemImportance:
    """Importance of the levels of a ladder's items as arrays, as an agent observes it.

    Each array has a row for each item and a column for each level, (items, W).

    Attributes:
        one_shot: ΔNLL if only this item has this level, nats per token.
        place: Place of the step to this level in an order of all steps, 0 = first, 1 = last.
        reached: ΔNLL that the order adds for this item until it has this level, nats per token.
    """

    one_shot: npt.NDArray[np.float64]
    place: npt.NDArray[np.float64]
    reached: npt.NDArray[np.float64]

    @classmethod
    def none(cls, ladder: Ladder) -> ItemImportance:
        """Zeros: the agent observes no importance."""
        zeros = np.zeros((len(ladder), ladder.width))
        return cls(zeros, zeros, zeros)


class ObservationEncoder(ABC):
    """Encodes requests and plans on a ladder as observations.

    Args:
        item_bytes: The model's byte arithmetic over the ladder.

    Attributes:
        space: ``Dict`` of ``request`` (5,) and the rows of all items (items, F), float32 in [0, 1],
            and ``action_mask`` (items,), int8, 1 where an item has a lower level. It imports
            gymnasium.
        importance: What is observed of the importance of blocks or of levels.
        freed: The column of a row with the bytes that the item's next level frees.
        zeros: Empty arrays of an observation.
    """

    key: ClassVar[str]
    """The entry of an observation with a row for each item."""
    features: ClassVar[tuple[str, ...]]
    """The columns of a row."""
    importance: ImportanceFeatures | ItemImportance

    def __init__(self, item_bytes: LadderBytes) -> None:
        self.item_bytes = item_bytes
        self.ladder = ladder = item_bytes.ladder
        self.freed = self.features.index("freed_share")
        self.zeros: Observation = {
            "request": np.zeros(len(REQUEST_FEATURES), np.float32),
            self.key: np.zeros((len(ladder), len(self.features)), np.float32),
            "action_mask": np.zeros(len(ladder), np.int8),
        }
        self.rows_of = lru_cache(_CACHED_ROWS)(self._rows_of)
        self.native_rows = lru_cache(_CACHED_SHAPES)(self._native_rows)

    @cached_property
    def space(self) -> spaces.Space[Observation]:
        """The space of observations."""
        from gymnasium import spaces

        boxes: dict[str, spaces.Space[Any]] = {
            name: spaces.Box(0.0, 1.0, zeros.shape, np.float32)
            for name, zeros in self.zeros.items()
        }
        boxes["action_mask"] = spaces.MultiBinary(len(self.ladder))
        return spaces.Dict(boxes)  # type: ignore[return-value]

    @property
    def memory(self) -> MemoryModel:
        """The model's byte arithmetic."""
        return self.item_bytes.memory

    @abstractmethod
    def _rows_of(self, steps: LevelSteps) -> Floats:
        """The row of each item at each level, (items, W, F), without the freed share."""

    def _native_rows(self, batch_size: int, seq_len_tokens: int) -> Floats:
        """The rows of the unchanged model for a batch size and a length, (items, F), read-only."""
        costs = self.item_bytes.costs(batch_size, seq_len_tokens)
        rows, native = self.rows_of(costs.steps)[:, 0].copy(), [0] * len(self.ladder)
        rows = self.encode(rows, costs.freed_bytes(native), costs.dense_peak_bytes)
        rows.flags.writeable = False
        return rows

    def encode(self, rows: Floats, freed_bytes: Any, dense_peak_bytes: Any) -> Floats:
        """Complete rows of `rows_of`, (..., F), by the bytes that the items' next levels free."""
        rows[..., self.freed] = freed_bytes * (freed_bytes > 0) / dense_peak_bytes
        return rows

    def build(self, request: Request, plan: Plan) -> Observation:
        """The observation of a plan under `request`, in new arrays.

        Raises:
            InvalidRequestError: The model cannot serve the request.
            UnknownNameError: The plan has levels that the ladder does not have.
        """
        costs = self.item_bytes.costs(request.batch_size, request.seq_len_tokens)
        state = costs.state(self.ladder.positions(plan) if plan else None)
        return ObservedState(self, request, state).observation


class ObservationBuilder(ObservationEncoder):
    """The encoder of `RAPPrune`: a row for each block, kept or removed.

    Args:
        memory: The model's byte arithmetic.
        importance: Importance of the blocks (see `rap_env.importance`).
        base: As for `LadderBytes`.
    """

    key = "blocks"
    features = BLOCK_FEATURES
    importance: ImportanceFeatures

    def __init__(
        self, memory: MemoryModel, importance: ImportanceFeatures, base: Plan = Plan()
    ) -> None:
        super().__init__(mask_bytes(memory, base))
        self.importance = importance

    def _rows_of(self, steps: LevelSteps) -> Floats:
        index, importance = np.arange(len(self.ladder)), self.importance
        rows = np.zeros((len(index), self.ladder.width, len(self.features)), dtype=np.float32)
        columns = {
            "kind": index % 2,
            "depth": (index // 2) / max(1, self.memory.facts.num_layers - 1),
            "one_shot_loss": squash(importance.one_shot),
            "gsi_rank": np.clip(importance.gsi_rank, 0.0, 1.0),
            "gsi_marginal_loss": squash(importance.gsi_marginal_loss),
        }
        for name, values in columns.items():
            rows[..., self.features.index(name)] = np.asarray(values)[:, None]
        rows[:, 0, self.features.index("kept")] = 1.0
        rows.flags.writeable = False
        return rows


class ItemObservationBuilder(ObservationEncoder):
    """The encoder of `RAPLadder`: a row for each item that has a lower level.

    Args:
        item_bytes: The model's byte arithmetic over the ladder.
        importance: Importance of the items' levels (see `rap_env.importance`).
    """

    key = "ladder"
    features = ITEM_FEATURES
    importance: ItemImportance

    def __init__(self, item_bytes: LadderBytes, importance: ItemImportance) -> None:
        super().__init__(item_bytes)
        self.importance = importance

    def _rows_of(self, steps: LevelSteps) -> Floats:
        ladder, importance, features = self.ladder, self.importance, self.features
        rows = np.zeros((len(ladder), ladder.width, len(features)), dtype=np.float32)
        deepest = max(1, self.memory.facts.num_layers - 1)
        for number, item in enumerate(ladder.items):
            rows[number, :, features.index(item.kind)] = 1.0
            rows[number, :, features.index("depth")] = (item.layer or 0) / deepest
            levels = np.arange(ladder.width) / (len(item.levels) - 1)
            rows[number, :, features.index("level")] = np.minimum(1.0, levels)
        has_next, lower = steps.next_level >= 0, np.maximum(steps.next_level, 0)
        one_shot, place, reached = (
            np.take_along_axis(array, lower, axis=1)
            for array in (importance.one_shot, importance.place, importance.reached)
        )
        rows[..., features.index("one_shot_cost")] = log_cost(one_shot) * has_next
        rows[..., features.index("order_place")] = place * has_next
        rows[..., features.index("order_cost")] = log_cost(reached - importance.reached) * has_next
        rows.flags.writeable = False
        return rows


class ObservedState:
    """The observation of one request while items are lowered one by one.

    Args:
        encoder: Encodes the observation.
        request: The request.
        state: The levels to begin with; None for native ones.

    Attributes:
        observation: The arrays.
        state: The current levels and their bytes.
    """

    def __init__(
        self,
        encoder: ObservationEncoder,
        request: Request,
        state: LadderState | None = None,
    ) -> None:
        costs = encoder.item_bytes.costs(request.batch_size, request.seq_len_tokens)
        self.state = costs.state() if state is None else state
        arrays = {key: array.copy() for key, array in encoder.zeros.items()}
        self.observation: Observation = arrays
        self._encoder, self._rows = encoder, encoder.rows_of(costs.steps)
        self._budget_bytes, self._dense_peak_bytes = request.budget_bytes, costs.dense_peak_bytes
        self._seen_rows, self._valid = arrays[encoder.key], arrays["action_mask"]
        self._request = arrays["request"]
        self._request[:] = request_features(
            encoder.memory,
            **vars(request),
            dense_peak_bytes=costs.dense_peak_bytes,
            kv_cache_bytes=costs.kv_cache_bytes,
        )
        if any(self.state.positions):
            self._show_all()
        else:
            self._seen_rows[:] = encoder.native_rows(request.batch_size, request.seq_len_tokens)
            self._valid[:] = costs.steps.native_valid
            self._show_bytes_over()

    def lower(self, item: int) -> Collection[int]:
        """Lower an item that has a lower level, with its companions.

        Returns:
            The items whose row changed.
        """
        return self.apply(self.state.lowering(item))

    def apply(self, lowering: Lowering) -> Collection[int]:
        """Make what `LadderState.lowering` returned happen; returns what `lower` does."""
        state, encoder = self.state, self._encoder
        state.apply(lowering)
        changed = state.changes(lowering)
        if len(changed) > _FEW:
            self._show_all()
            return changed
        for item in changed:
            row = self._rows[item, state.positions[item]]
            if state.is_valid(item):
                freed_bytes = state.freed_bytes(item)
                row = encoder.encode(row.copy(), freed_bytes, self._dense_peak_bytes)
            else:  # nothing to free
                self._valid[item] = 0
            self._seen_rows[item] = row
        self._show_bytes_over()
        return changed

    def _show_all(self) -> None:
        encoder, costs = self._encoder, self.state.costs
        items, positions = encoder.ladder.item_array, np.array(self.state.positions)
        self._seen_rows[:] = encoder.encode(
            self._rows[items, positions], costs.freed_bytes(positions), costs.dense_peak_bytes
        )
        self._valid[:] = costs.steps.next_level[items, positions] >= 0
        self._show_bytes_over()

    def _show_bytes_over(self) -> None:
        peak_bytes, budget_bytes = self.state.peak_bytes, self._budget_bytes
        self._request[BYTES_OVER] = bytes_over(peak_bytes, budget_bytes, self._dense_peak_bytes)


def request_features(
    memory: MemoryModel,
    *,
    batch_size: int | Counts,
    seq_len_tokens: int | Counts,
    budget_bytes: int | Counts,
    dense_peak_bytes: int | Counts,
    kv_cache_bytes: int | Counts,
) -> Floats:
    """The features `REQUEST_FEATURES` of a request that the unchanged model serves, (5,).

    Args:
        memory: The model's byte arithmetic.
        batch_size: Of the request; like the others, a number, or an array (n,) for n requests.
        seq_len_tokens: Of the request.
        budget_bytes: Of the request.
        dense_peak_bytes: Peak bytes of the unchanged model.
        kv_cache_bytes: Bytes of its KV cache.

    Returns:
        The features, (5,) or (n, 5).
    """
    seen = [
        np.minimum(1.0, budget_bytes / dense_peak_bytes),
        np.minimum(1.0, np.log2(batch_size) / MAX_BATCH_LOG2),
        np.minimum(1.0, np.log2(seq_len_tokens) / np.log2(max(2, memory.facts.max_positions))),
        np.maximum(0, dense_peak_bytes - budget_bytes) / dense_peak_bytes,
        kv_cache_bytes / dense_peak_bytes,
    ]
    return np.array(seen, dtype=np.float32).T


def bytes_over(peak_bytes: int, budget_bytes: int, dense_peak_bytes: int) -> float:
    """Bytes above the budget as a share of the dense peak, in [0, 1]."""
    return min(1.0, max(0, peak_bytes - budget_bytes) / dense_peak_bytes)


def squash(delta_nll: npt.ArrayLike) -> Floats:
    """Map ΔNLL values in nats per token onto [0, 1): x / (1 + x), and 0 below 0.

    Infinity gives 1.
    """
    positive = np.maximum(np.asarray(delta_nll, dtype=np.float64), 0.0)
    return np.asarray(1.0 - 1.0 / (1.0 + positive), dtype=np.float32)


def log_cost(cost: npt.NDArray[np.float64]) -> Floats:
    """Map costs in nats per token onto [0, 1] on a log scale; 0 where a cost is not above 0.

    The costs of levels span five decades. x / (1 + x) would show all cheap levels as 0.
    """
    scale = np.log1p(COST_CEILING / COST_FLOOR)
    logs = np.log1p(np.clip(cost, 0.0, COST_CEILING) / COST_FLOOR) / scale
    return np.asarray(logs, dtype=np.float32)
