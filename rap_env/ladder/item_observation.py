"""Observations of a request and a plan, with a row for each item. No model is run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from rap_env.costs import freed_share
from rap_env.ladder.item_bytes import LadderBytes
from rap_env.ladder.items import KINDS, Ladder, LevelSteps
from rap_env.observation import (
    BYTES_OVER,
    REQUEST_FEATURES,
    Observation,
    bytes_over,
    request_features,
)
from rap_env.plan import Plan
from rap_env.request import Request

ITEM_FEATURES = (
    *KINDS,
    "depth",
    "level",
    "freed_share",
    "one_shot_cost",
    "order_place",
    "order_cost",
)
"""Columns of the observation's ``ladder``."""

FREED = ITEM_FEATURES.index("freed_share")

COST_FLOOR, COST_CEILING = 1e-4, 10.0
"""Costs in nats per token that are observed as about 0 and as 1, on a log scale between."""

_CACHED_ROWS = 64

_FEW = 8
"""Rows of an observation that are faster to update one by one than all at once."""


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


class ItemObservationBuilder:
    """Builds observations of one model with a row for each item of a ladder.

    Args:
        item_bytes: The model's byte arithmetic over the ladder.
        importance: Importance of the items' levels (see `rap_env.importance`).

    Attributes:
        importance: As given.
        space: ``Dict`` of ``request`` (5,) and ``ladder`` (items, 10), float32 in [0, 1], and
            ``action_mask`` (items,), int8, 1 where an item has a lower level.
    """

    def __init__(self, item_bytes: LadderBytes, importance: ItemImportance) -> None:
        self.item_bytes = item_bytes
        self.ladder = ladder = item_bytes.ladder
        self.importance = importance
        count = len(ladder)
        self.space: spaces.Space[Observation] = spaces.Dict(  # type: ignore[assignment]
            {
                "request": spaces.Box(0.0, 1.0, (len(REQUEST_FEATURES),), np.float32),
                "ladder": spaces.Box(0.0, 1.0, (count, len(ITEM_FEATURES)), np.float32),
                "action_mask": spaces.MultiBinary(count),
            }
        )
        deepest = max(1, item_bytes.memory.facts.num_layers - 1)
        rows = np.zeros((count, ladder.width, len(ITEM_FEATURES)), dtype=np.float32)
        for number, item in enumerate(ladder.items):
            rows[number, :, KINDS.index(item.kind)] = 1.0
            rows[number, :, len(KINDS)] = (item.layer or 0) / deepest
            levels = np.arange(ladder.width) / (len(item.levels) - 1)
            rows[number, :, len(KINDS) + 1] = np.minimum(1.0, levels)
        self._fixed = rows  # columns that do not depend on the request
        self._numbers = np.arange(count)
        self.rows_of = lru_cache(_CACHED_ROWS)(self._rows_of)

    def build(self, request: Request, plan: Plan) -> Observation:
        """The observation of a plan under `request`, in new arrays.

        Raises:
            InvalidRequestError: The model cannot serve the request.
            UnknownNameError: The plan has levels that the ladder does not have.
        """
        costs = self.item_bytes.costs(request.batch_size, request.seq_len_tokens)
        state = costs.state(self.ladder.positions(plan))
        positions = state.positions
        seen = request_features(
            self.item_bytes.memory,
            **vars(request),
            dense_peak_bytes=costs.dense_peak_bytes,
            kv_cache_bytes=costs.kv_cache_bytes,
        )
        seen[BYTES_OVER] = bytes_over(
            state.peak_bytes, request.budget_bytes, costs.dense_peak_bytes
        )
        items = self.rows_of(costs.steps)[self._numbers, positions]
        items[:, FREED] = freed_share(costs.freed_bytes(positions), costs.dense_peak_bytes)
        valid = costs.steps.next_level[self._numbers, positions] >= 0
        return {"request": seen, "ladder": items, "action_mask": valid.astype(np.int8)}

    def _rows_of(self, steps: LevelSteps) -> npt.NDArray[np.float32]:
        """The row of each item at each level, (items, W, features), without the freed share."""
        known, has_next = self.importance, steps.next_level >= 0
        lower = np.maximum(steps.next_level, 0)
        one_shot, place, reached = (
            np.take_along_axis(array, lower, axis=1)
            for array in (known.one_shot, known.place, known.reached)
        )
        rows = self._fixed.copy()
        rows[..., FREED + 1] = log_cost(one_shot) * has_next
        rows[..., FREED + 2] = place * has_next
        rows[..., FREED + 3] = log_cost(reached - known.reached) * has_next
        rows.flags.writeable = False
        return rows


class ItemObservationTracker:
    """The observation of a request while items are lowered one by one, in arrays of its own.

    Attributes:
        observation: The current arrays, updated in place; the request's bytes over budget excepted.
        levels: The current levels and their bytes.
    """

    def __init__(self, builder: ItemObservationBuilder, request: Request) -> None:
        self._costs = builder.item_bytes.costs(request.batch_size, request.seq_len_tokens)
        self._rows = builder.rows_of(self._costs.steps)
        self._numbers = np.arange(len(builder.ladder))
        self.observation = builder.build(request, Plan())
        self.levels = self._costs.state()

    def lower(self, item: int) -> set[int]:
        """Lower an item that has a lower level.

        Returns:
            The items whose row changed.
        """
        levels, costs = self.levels, self._costs
        rows, valid = self.observation["ladder"], self.observation["action_mask"]
        changed = levels.lower(item)
        if len(changed) > _FEW:
            rows[:] = self._rows[self._numbers, levels.positions]
            freed = costs.freed_bytes(levels.positions)
            rows[:, FREED] = freed_share(freed, costs.dense_peak_bytes)
            valid[:] = costs.steps.next_level[self._numbers, levels.positions] >= 0
            return changed
        for one in changed:
            row = rows[one]
            row[:] = self._rows[one, levels.positions[one]]
            row[FREED] = min(1.0, max(0, levels.freed_bytes(one)) / costs.dense_peak_bytes)
            valid[one] = levels.is_valid(one)
        return changed


def log_cost(cost: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """Map costs in nats per token onto [0, 1] on a log scale; 0 where a cost is not above 0.

    The costs of levels span five decades. x / (1 + x) would show all cheap levels as 0.
    """
    scale = np.log1p(COST_CEILING / COST_FLOOR)
    logs = np.log1p(np.clip(cost, 0.0, COST_CEILING) / COST_FLOOR) / scale
    return np.asarray(logs, dtype=np.float32)
