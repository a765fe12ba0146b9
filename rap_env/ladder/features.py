"""The numbers of an observation: the columns of a request and of an item, as shares in [0, 1]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from rap_env.ladder.items import ITEM_KINDS, Ladder
from rap_env.ladder.steps import LevelSteps

REQUEST_FEATURES = ("budget", "batch_size", "seq_len", "bytes_over", "kv_share")
"""Columns of ``request``."""

BUDGET = REQUEST_FEATURES.index("budget")
"""The column of ``request`` that depends on the budget alone."""

BYTES_OVER = REQUEST_FEATURES.index("bytes_over")
"""The column of ``request`` that depends on the plan."""

MAX_BATCH_LOG2 = 8
"""A batch of 256 or more sequences is observed as 1.0."""

BLOCK_FEATURES = (
    "kind", "depth", "kept", "freed_share", "one_shot_loss", "gsi_rank", "gsi_marginal_loss",
)  # fmt: skip
"""Columns of a block's row, ``blocks``."""

ITEM_FEATURES = (
    *ITEM_KINDS, "depth", "level", "freed_share", "one_shot_cost", "order_place", "order_cost",
)  # fmt: skip
"""Columns of an item's row, ``ladder``."""

SHOWN_LEVELS = 5
"""Levels below the native one that `EveryLevel` has columns for."""

_LEVEL_FEATURES = (
    "share0",
    *(f"{kind}{position}" for position in range(1, SHOWN_LEVELS + 1) for kind in ("cost", "share")),
)

COST_FLOOR, COST_CEILING = 1e-4, 10.0
"""Costs in nats per token that are observed as about 0 and as 1, on a log scale between."""

Float32s = npt.NDArray[np.float32]
Columns = Mapping[str, npt.ArrayLike]
"""The columns of each item at each level by name, (items, W), or (items, 1) for all
levels."""


@dataclass(frozen=True, eq=False)
class ImportanceFeatures:
    """Importance of the 2L blocks as arrays, as an agent observes it.

    Attributes:
        one_shot: ΔNLL of removing only this block, nats per token, (2L,).
        gsi_rank: Position in the GSI order, 0 = removed first, 1 = last, (2L,).
        gsi_marginal_loss: ΔNLL added by its removal in that order, nats per token, (2L,).
    """

    key: ClassVar[str] = "blocks"
    features: ClassVar[tuple[str, ...]] = BLOCK_FEATURES

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

    def columns(self, steps: LevelSteps, num_layers: int) -> Columns:
        """The columns of a row, ``freed_share`` left out."""
        index = np.arange(len(steps.ladder))[:, None]
        return {
            "kind": index % 2,
            "depth": (index // 2) / max(1, num_layers - 1),
            "kept": np.arange(steps.ladder.width) == 0,
            "one_shot_loss": squash(self.one_shot)[:, None],
            "gsi_rank": np.clip(self.gsi_rank, 0.0, 1.0)[:, None],
            "gsi_marginal_loss": squash(self.gsi_marginal_loss)[:, None],
        }

    def removal_order(self, ladder: Ladder) -> tuple[int, ...]:
        """The blocks by their rank; none if it is not known, which gives all the same one."""
        order = np.argsort(self.gsi_rank, kind="stable").tolist()
        return tuple(order) if np.ptp(self.gsi_rank) else ()

    def delta_nll(self, positions: Sequence[int]) -> float | None:
        """None: it predicts nothing."""
        return None


@dataclass(frozen=True, eq=False)
class ItemImportance:
    """Importance of the levels of a ladder's items as arrays, as an agent observes it.

    Each array has a row for each item and a column for each level, (items, W).

    Attributes:
        one_shot: ΔNLL if only this item has this level, nats per token.
        place: Place of the step to this level in an order of all steps, 0 = first, 1 = last.
        reached: ΔNLL that the order adds for this item until it has this level, nats per
            token.
    """

    key: ClassVar[str] = "ladder"
    features: ClassVar[tuple[str, ...]] = ITEM_FEATURES

    one_shot: npt.NDArray[np.float64]
    place: npt.NDArray[np.float64]
    reached: npt.NDArray[np.float64]

    @classmethod
    def none(cls, ladder: Ladder) -> ItemImportance:
        """Zeros: the agent observes no importance."""
        zeros = np.zeros((len(ladder), ladder.width))
        return cls(zeros, zeros, zeros)

    def columns(self, steps: LevelSteps, num_layers: int) -> Columns:
        """The columns of a row, ``freed_share`` left out."""
        ladder, has_next = steps.ladder, steps.next_level >= 0
        one_shot, place, reached = (
            np.take_along_axis(array, np.maximum(steps.next_level, 0), axis=1)
            for array in (self.one_shot, self.place, self.reached)
        )
        layers = np.array([[item.layer or 0] for item in ladder.items])
        last_levels = np.array([[len(item.levels) - 1] for item in ladder.items])
        return {
            **{kind: [[item.kind == kind] for item in ladder.items] for kind in ITEM_KINDS},
            "depth": layers / max(1, num_layers - 1),
            "level": np.minimum(1.0, np.arange(ladder.width) / last_levels),
            "one_shot_cost": log_cost(one_shot) * has_next,
            "order_place": place * has_next,
            "order_cost": log_cost(reached - self.reached) * has_next,
        }

    def removal_order(self, ladder: Ladder) -> tuple[int, ...]:
        """The blocks by the place of their removal; none without an order."""
        places = {
            item.block: self.place[number, len(item.levels) - 1]
            for number, item in enumerate(ladder.items)
            if item.levels[-1] == "removed"
        }
        return tuple(sorted(places, key=places.__getitem__)) if self.place.any() else ()

    def delta_nll(self, positions: Sequence[int]) -> float | None:
        """What the order adds until items are at some positions of their levels, nats per token.

        None without an order.
        """
        rises = self.reached[np.arange(len(positions)), positions]
        return float(rises.sum()) if self.reached.any() else None


@dataclass(frozen=True, eq=False)
class EveryLevel(ItemImportance):
    """`ItemImportance` with columns for each level of an item, whichever it has now.

    For each of `SHOWN_LEVELS` positions below the native one: the ΔNLL if only this item has
    that level, on the scale of `log_cost`, and its bytes, as a share of the native bytes of all
    items that do not depend on the request. 0 where there is no such level.

    Attributes:
        item_bytes: Bytes of each item at each level, caches left out, (items, W).
    """

    features: ClassVar[tuple[str, ...]] = (*ITEM_FEATURES, *_LEVEL_FEATURES)

    item_bytes: npt.NDArray[np.int64]

    def columns(self, steps: LevelSteps, num_layers: int) -> Columns:
        """The columns of a row, ``freed_share`` left out."""
        ladder, native = steps.ladder, self.item_bytes[:, 0].sum()
        costs, shares = log_cost(self.one_shot), self.item_bytes / max(1, native)
        columns = {**super().columns(steps, num_layers), "share0": shares[:, :1]}
        for position in range(1, min(SHOWN_LEVELS, ladder.width - 2) + 1):
            exists = np.array([[position < len(item.levels)] for item in ladder.items])
            columns[f"cost{position}"] = costs[:, [position]] * exists
            columns[f"share{position}"] = shares[:, [position]] * exists
        return columns


Importance = ImportanceFeatures | ItemImportance
"""What is observed of the importance of blocks or of levels; it determines the columns."""

IMPORTANCE_TYPES: dict[str, type[Importance]] = {
    kind.key: kind for kind in (ImportanceFeatures, ItemImportance)
}
"""By the entry of an observation that shows it: the layout of observations."""


def bytes_over(peak_bytes: Any, budget_bytes: Any, native_peak_bytes: Any) -> Any:
    """Bytes above the budget as a share of the native peak, in [0, 1]; numbers or arrays.

    Products with conditions take both, and are faster than NumPy's functions for a number.
    """
    over_bytes = peak_bytes - budget_bytes
    share = over_bytes * (over_bytes > 0) / native_peak_bytes
    return share * (share < 1) + (share >= 1)


def squash(delta_nll: npt.ArrayLike) -> Float32s:
    """Map ΔNLL values in nats per token onto [0, 1): x / (1 + x), and 0 below 0.

    Infinity gives 1.
    """
    positive = np.maximum(np.asarray(delta_nll, dtype=np.float64), 0.0)
    return np.asarray(1.0 - 1.0 / (1.0 + positive), dtype=np.float32)


def log_cost(cost: npt.NDArray[np.float64]) -> Float32s:
    """Map costs in nats per token onto [0, 1] on a log scale; 0 where a cost is not above 0.

    The costs of levels span five decades. x / (1 + x) would show all cheap levels as 0.
    """
    scale = np.log1p(COST_CEILING / COST_FLOOR)
    logs = np.log1p(np.clip(cost, 0.0, COST_CEILING) / COST_FLOOR) / scale
    return np.asarray(logs, dtype=np.float32)
