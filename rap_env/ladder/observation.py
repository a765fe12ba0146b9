"""Observations of a request and of a plan on a ladder. No model is run.

An observation is a dict of arrays: ``request``, a row for each item under
`ObservationEncoder.key`, and ``action_mask``. Both tasks and the runtime's policies use the
same encoder; `RAPPrune` and `RAPLadder` differ in the columns of a row, see
`rap_env.ladder.features`. Without torch.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rap_env.ladder.features import (
    BUDGET,
    BYTES_OVER,
    MAX_BATCH_LOG2,
    REQUEST_FEATURES,
    Floats,
    Importance,
    bytes_over,
)
from rap_env.ladder.items import Counts
from rap_env.ladder.ladder_bytes import LadderBytes
from rap_env.ladder.state import LadderCosts, LadderState, Lowering, StackedCosts
from rap_env.ladder.steps import LevelSteps
from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.request import Request

if TYPE_CHECKING:
    from gymnasium import spaces

Observation = dict[str, npt.NDArray[Any]]

_CACHED_ROWS = 64
_CACHED_LEVELS = 2**19  # cached rows of levels, over all shapes of requests

_FEW = 8
"""Rows of an observation that are faster to update one by one than all at once."""


class ObservationEncoder:
    """Encodes requests and plans on a ladder as observations.

    Args:
        ladder_bytes: The model's byte arithmetic over the ladder; that of `mask_bytes` for
            the importance of blocks.
        importance: What is observed of the importance of blocks or of levels.

    Attributes:
        key: The entry of an observation with a row for each item.
        features: The columns of a row.
        freed: The column with the bytes that the item's next level frees.
        zeros: Empty arrays of an observation.
    """

    def __init__(self, ladder_bytes: LadderBytes, importance: Importance) -> None:
        self.ladder_bytes, self.importance = ladder_bytes, importance
        self.ladder = ladder = ladder_bytes.ladder
        self.key, self.features = importance.key, importance.features
        self.freed = self.features.index("freed_share")
        self.zeros: Observation = {
            "request": np.zeros(len(REQUEST_FEATURES), np.float32),
            self.key: np.zeros((len(ladder), len(self.features)), np.float32),
            "action_mask": np.zeros(len(ladder), np.int8),
        }
        self._fixed_columns = lru_cache(_CACHED_ROWS)(self._make_fixed_columns)
        cached_shapes = max(_CACHED_ROWS, _CACHED_LEVELS // (len(ladder) * ladder.width))
        self.level_rows = lru_cache(cached_shapes)(self._make_level_rows)
        self.native = lru_cache(cached_shapes)(self._make_native)

    @cached_property
    def space(self) -> spaces.Space[Observation]:
        """The space of observations; it imports gymnasium.

        ``Dict`` of ``request`` (5,) and the rows of all items (items, F), float32 in [0, 1],
        and ``action_mask`` (items,), int8, 1 where an item has a lower level.
        """
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
        return self.ladder_bytes.memory

    @property
    def spec(self) -> dict[str, Any]:
        """What makes it for a context: arguments of `make_encoder` there, as JSON values."""
        return {"layout": self.key, **self.ladder.spec}

    def _make_fixed_columns(self, steps: LevelSteps) -> Floats:
        rows = np.zeros((len(self.ladder), self.ladder.width, len(self.features)), np.float32)
        columns = self.importance.columns(steps, self.memory.facts.num_layers)
        for name, values in columns.items():
            rows[..., self.features.index(name)] = values
        return rows

    def _make_level_rows(self, costs: LadderCosts) -> Floats:
        """The row of each item at each level, (items, W, F), read-only.

        The bytes of the cache that a block takes with it are left out, see `encode`.
        """
        rows = self._fixed_columns(costs.steps).copy()
        rows[..., self.freed] = np.maximum(0, costs.freed) / costs.dense_peak_bytes
        rows.flags.writeable = False
        return rows

    def encode(
        self, costs: StackedCosts, rows: Floats, positions: Counts, shape: Counts | int = 0
    ) -> tuple[Floats, npt.NDArray[np.bool_]]:
        """The rows and the action masks of plans, (n, items, F) and (n, items).

        Args:
            costs: The bytes of s shapes of requests.
            rows: The `level_rows` of each shape, (s, items, W, F).
            positions: As for `StackedCosts`.
            shape: As for `StackedCosts`.
        """
        levels = costs.levels(positions, shape)
        encoded = rows.reshape(-1, len(self.features)).take(levels, axis=0)
        if self.ladder.caches:
            freed_bytes = np.maximum(0, costs.freed_bytes(levels))
            encoded[..., self.freed] = freed_bytes / costs.dense_peak_bytes[shape, None]
        return encoded, costs.nexts(levels) >= 0

    def _make_native(self, batch_size: int, seq_len_tokens: int) -> Observation:
        """The observation of the unchanged model, without what depends on the budget."""
        costs = self.ladder_bytes.costs(batch_size, seq_len_tokens)
        native = np.zeros(len(self.ladder), dtype=np.int64)
        rows, valid = self.encode(costs.stacked, self.level_rows(costs), native)
        longest = max(2, self.memory.facts.max_positions)
        request = {
            "batch_size": min(1.0, np.log2(batch_size) / MAX_BATCH_LOG2),
            "seq_len": min(1.0, np.log2(seq_len_tokens) / np.log2(longest)),
            "kv_share": costs.kv_cache_bytes / costs.dense_peak_bytes,
        }
        features = [request.get(name, 0.0) for name in REQUEST_FEATURES]
        return {
            "request": np.array(features, dtype=np.float32),
            self.key: rows,
            "action_mask": valid.astype(np.int8),
        }

    def build(self, request: Request, plan: Plan) -> Observation:
        """The observation of a plan under `request`, in new arrays.

        Raises:
            InvalidRequestError: The model cannot serve the request.
            UnknownNameError: The plan has levels that the ladder does not have.
        """
        costs = self.ladder_bytes.costs(request.batch_size, request.seq_len_tokens)
        state = costs.state(self.ladder.positions(plan) if plan else None)
        return ObservedState(self, request, state).observation


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
        costs = encoder.ladder_bytes.costs(request.batch_size, request.seq_len_tokens)
        self.state = costs.state() if state is None else state
        native = encoder.native(request.batch_size, request.seq_len_tokens)
        self.observation: Observation = {key: array.copy() for key, array in native.items()}
        self._encoder, self._steps = encoder, costs.steps
        self._level_rows = encoder.level_rows(costs)
        self._budget_bytes, self._dense_peak_bytes = request.budget_bytes, costs.dense_peak_bytes
        self._rows, self._valid = self.observation[encoder.key], self.observation["action_mask"]
        self._request = self.observation["request"]
        self._request[BUDGET] = min(1.0, request.budget_bytes / costs.dense_peak_bytes)
        if any(self.state.positions):
            self._show_all()
        self._show_bytes_over()

    def lower(self, item: int) -> Collection[int]:
        """Lower an item that has a lower level, with its companions.

        Returns:
            The items whose row changed.
        """
        return self.apply(self.state.preview(item))

    def apply(self, lowering: Lowering) -> Collection[int]:
        """Make what `LadderState.preview` returned happen; returns what `lower` does."""
        state = self.state
        state.apply(lowering)
        changed = state.changes(lowering)
        if len(changed) > _FEW:
            self._show_all()
        else:
            for item in changed:
                self._show(item)
        self._show_bytes_over()
        return changed

    def _show(self, item: int) -> None:
        position, steps = self.state.positions[item], self._steps
        self._rows[item] = self._level_rows[item, position]
        self._valid[item] = steps.nexts[item][position] >= 0
        if len(steps.own_moves[item][position]) > 1:  # its cache counts too
            freed_bytes = max(0, self.state.freed_bytes(item))
            self._rows[item, self._encoder.freed] = freed_bytes / self._dense_peak_bytes

    def _show_all(self) -> None:
        costs, positions = self.state.costs.stacked, np.array(self.state.positions)
        self._rows[:], self._valid[:] = self._encoder.encode(costs, self._level_rows, positions)

    def _show_bytes_over(self) -> None:
        peak_bytes, budget_bytes = self.state.peak_bytes, self._budget_bytes
        self._request[BYTES_OVER] = bytes_over(peak_bytes, budget_bytes, self._dense_peak_bytes)


class ObservedPlans:
    """The observations of many plans at once, each under one of s requests.

    Args:
        encoder: Encodes the observations.
        count: Number of requests, s; `put` sets them.

    Attributes:
        costs: The bytes of the requests.
        budget_bytes: Their budgets, (s,).
    """

    def __init__(self, encoder: ObservationEncoder, count: int) -> None:
        rows = encoder.zeros[encoder.key]
        self._encoder, self.costs = encoder, StackedCosts.of_shapes(encoder.ladder, count)
        self.budget_bytes = np.zeros(count, dtype=np.int64)
        self._request = np.zeros((count, len(REQUEST_FEATURES)), dtype=np.float32)
        shape = count, len(rows), encoder.ladder.width, rows.shape[1]
        self._level_rows = np.zeros(shape, dtype=np.float32)

    def put(self, numbers: Counts, requests: Sequence[Request]) -> None:
        """Set some requests, given by number, (m,).

        Raises:
            InvalidRequestError: The model cannot serve one of them.
        """
        encoder = self._encoder
        costs = [encoder.ladder_bytes.costs(r.batch_size, r.seq_len_tokens) for r in requests]
        self.costs.put(numbers, costs)
        for number, entry in zip(numbers.tolist(), costs, strict=True):
            self._level_rows[number] = encoder.level_rows(entry)
        self._request[numbers] = [
            encoder.native(r.batch_size, r.seq_len_tokens)["request"] for r in requests
        ]
        self.budget_bytes[numbers] = [request.budget_bytes for request in requests]
        shares = self.budget_bytes[numbers] / self.costs.dense_peak_bytes[numbers]
        self._request[numbers, BUDGET] = np.minimum(1.0, shares)

    def observe(self, positions: Counts, which: Counts, peak_bytes: Counts) -> Observation:
        """The observations, in new arrays with n rows.

        Args:
            positions: The positions of each plan's levels, (n, items).
            which: Number of each plan's request, (n,).
            peak_bytes: The peak bytes of each plan, (n,).
        """
        request, dense_peak_bytes = self._request[which], self.costs.dense_peak_bytes[which]
        request[:, BYTES_OVER] = bytes_over(peak_bytes, self.budget_bytes[which], dense_peak_bytes)
        rows, valid = self._encoder.encode(self.costs, self._level_rows, positions, which)
        return {"request": request, self._encoder.key: rows, "action_mask": valid.astype(np.int8)}
