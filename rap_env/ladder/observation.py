"""Observations of a request and of a plan on a ladder. No model is run.

An observation is a dict of arrays: ``request``, a row for each item under
`ObservationEncoder.key`, and ``action_mask``. Both tasks and the runtime's policies use the
same encoder; `RAPPrune` and `RAPLadder` differ in the columns of a row, see
`rap_env.ladder.features`. Without torch.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rap_env.ladder.features import (
    BUDGET,
    BYTES_OVER,
    MAX_BATCH_LOG2,
    REQUEST_FEATURES,
    Float32s,
    Importance,
    bytes_over,
)
from rap_env.ladder.items import Counts
from rap_env.ladder.ladder_bytes import LadderBytes
from rap_env.ladder.state import LadderState, Lowering, StackedCosts, column
from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.request import Request

if TYPE_CHECKING:
    from gymnasium import spaces

Observation = dict[str, npt.NDArray[Any]]

_BATCH_SIZE, _SEQ_LEN, _KV_SHARE = map(
    REQUEST_FEATURES.index, ("batch_size", "seq_len", "kv_share")
)

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
        row_type: The type of a row as one value, which is faster to copy.
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
        self.row_type = np.dtype((np.void, 4 * len(self.features)))
        self._fixed: list[Float32s] = []
        self._all_fixed = np.zeros(0, dtype=self.row_type)

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

    def fixed_rows(self, kind: int) -> Float32s:
        """The rows of each item at each level without the bytes freed, (items, W, F), read-only.

        `kind` is the place of the request's steps in those of the tables.
        """
        while len(self._fixed) <= kind:
            steps = self.ladder_bytes.tables.steps[len(self._fixed)]
            rows = np.zeros((len(self.ladder), self.ladder.width, len(self.features)), np.float32)
            columns = self.importance.columns(steps, self.memory.facts.num_layers)
            for name, values in columns.items():
                rows[..., self.features.index(name)] = values
            rows.flags.writeable = False
            self._fixed.append(rows)
        return self._fixed[kind]

    def encode(
        self,
        costs: StackedCosts,
        items: Any,
        positions: npt.NDArray[Any],
        counterparts: npt.NDArray[Any],
        shape: Any = 0,
    ) -> tuple[npt.NDArray[np.void], npt.NDArray[np.bool_]]:
        """The rows of items, as values of `row_type`, and whether they have a lower level.

        Args:
            costs: The bytes of s shapes of requests.
            items: The items.
            positions: The positions of their levels.
            counterparts: Those of their counterparts, see `Ladder.counterparts`.
            shape: The number of each one's shape.
        """
        levels = costs.levels(items, positions)
        kinds = len(costs.tables.steps)
        if len(self._all_fixed) < kinds * costs.tables.size:
            rows = np.stack([self.fixed_rows(kind) for kind in range(kinds)])
            self._all_fixed = rows.view(self.row_type).ravel()
        places = costs.in_steps(levels, shape)
        valid = costs.tables.next_level.take(places) >= 0
        encoded = self._all_fixed.take(places)
        freed_bytes = costs.freed_bytes(items, levels, places, counterparts, shape)
        shares = np.maximum(0, freed_bytes) / costs.native_peak_bytes[shape]
        floats = encoded.view(np.float32).reshape(*levels.shape, len(self.features))
        floats[..., self.freed] = shares
        return encoded, valid

    def encode_plans(
        self, costs: StackedCosts, positions: Counts, shape: Counts | int = 0
    ) -> tuple[Float32s, npt.NDArray[np.int8]]:
        """The rows and the action masks of plans, (n, items, F) and (n, items).

        Args:
            costs: The bytes of s shapes of requests.
            positions: The positions of the plans' levels, (n, items) or (items,).
            shape: The number of each plan's shape, (n,), or one number for all.
        """
        items, others = np.arange(len(self.ladder)), positions[..., self.ladder.counterpart_array]
        encoded, valid = self.encode(costs, items, positions, others, column(shape))
        rows = encoded.view(np.float32).reshape(*positions.shape, len(self.features))
        self.show_together(rows, costs, positions, shape)
        return rows, valid.astype(np.int8)

    def show_together(
        self,
        rows: Float32s,
        costs: StackedCosts,
        positions: Counts,
        shape: Counts | int,
        at: Counts | None = None,
    ) -> None:
        """Show what caches that take a level together free.

        Args:
            rows: The rows of plans, (n, items, F).
            costs: As for `encode_plans`, with `positions` and `shape`.
            positions: As above.
            shape: As above.
            at: Which of the plans in `rows` these are, (m,); None for all.
        """
        if self.ladder.together:
            plans, items, freed = costs.freed_together(
                positions.reshape(-1, len(self.ladder)), shape
            )
            of_plans = shape[plans] if isinstance(shape, np.ndarray) else shape
            shares = np.maximum(0, freed) / costs.native_peak_bytes[of_plans]
            where = plans if at is None else at[plans]
            rows.reshape(-1, *rows.shape[-2:])[where, items, self.freed] = shares

    def request(self, costs: StackedCosts, budget_bytes: Counts) -> Float32s:
        """What is observed of requests whatever the plan, (s, 5).

        Args:
            costs: Their bytes.
            budget_bytes: Their budgets, (s,).
        """
        seen = np.zeros((len(budget_bytes), len(REQUEST_FEATURES)), dtype=np.float32)
        longest = max(2, self.memory.facts.max_positions)
        seen[:, _BATCH_SIZE] = np.minimum(1.0, np.log2(costs.batch_sizes) / MAX_BATCH_LOG2)
        seen[:, _SEQ_LEN] = np.minimum(1.0, np.log2(costs.seq_lens_tokens) / np.log2(longest))
        seen[:, _KV_SHARE] = costs.kv_cache_bytes / costs.native_peak_bytes
        seen[:, BUDGET] = np.minimum(1.0, budget_bytes / costs.native_peak_bytes)
        return seen

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
        if state is None:
            shape = request.batch_size, request.seq_len_tokens
            state = encoder.ladder_bytes.costs(*shape).state()
        self.state, costs = state, state.costs
        rows, valid = encoder.encode_plans(costs.stacked, np.array(state.positions))
        seen = encoder.request(costs.stacked, np.array([request.budget_bytes]))
        self.observation: Observation = {
            "request": seen[0],
            encoder.key: rows,
            "action_mask": valid,
        }
        self._encoder, self._steps = encoder, costs.steps
        self._fixed_rows = encoder.fixed_rows(int(costs.stacked.kinds[0]))
        self._budget_bytes, self._native_peak_bytes = request.budget_bytes, costs.native_peak_bytes
        self._rows, self._valid, self._request = rows, valid, seen[0]
        self._show_bytes_over()

    def lower(self, item: int) -> None:
        """Lower an item that has a lower level, with its companions."""
        self.apply(self.state.preview(item))

    def apply(self, lowering: Lowering) -> None:
        """Make what `LadderState.preview` returned happen."""
        state = self.state
        state.apply(lowering)
        changed = state.changes(lowering)
        ladder = self._encoder.ladder
        caches_change = bool(ladder.together) and not changed.isdisjoint(ladder.caches)
        if caches_change or len(changed) > _FEW:
            self._show_all()
        else:
            for item in changed:
                self._show(item)
        self._show_bytes_over()

    def _show(self, item: int) -> None:
        position, row = self.state.positions[item], self._rows[item]
        row[:] = self._fixed_rows[item, position]
        self._valid[item] = valid = self._steps.nexts[item][position] >= 0
        if valid:
            freed_bytes = max(0, self.state.freed_bytes(item))
            row[self._encoder.freed] = freed_bytes / self._native_peak_bytes

    def _show_all(self) -> None:
        costs, positions = self.state.costs.stacked, np.array(self.state.positions)
        self._rows[:], self._valid[:] = self._encoder.encode_plans(costs, positions)

    def _show_bytes_over(self) -> None:
        peak_bytes, budget_bytes = self.state.peak_bytes, self._budget_bytes
        self._request[BYTES_OVER] = bytes_over(peak_bytes, budget_bytes, self._native_peak_bytes)
