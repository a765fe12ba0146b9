"""The input row of a policy network for each action: its columns and constants.

Training (`agents.networks`, in torch) and the runtime (`rap_env.policies.network`, in NumPy)
build the same rows from these definitions. A row is made from an observation: of blocks
(`RAPPrune-v0`) or of the items of a ladder (`RAPLadder-v0`).

Shapes: N blocks or items, F observed features of each, V entries of a learned vector.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from rap_env.ladder.features import (
    BLOCK_FEATURES,
    COST_CEILING,
    COST_FLOOR,
    ITEM_FEATURES,
    REQUEST_FEATURES,
)
from rap_env.ladder.items import ITEM_KINDS

Float32s = npt.NDArray[np.float32]
Numbers = npt.NDArray[np.int64]

_HIDES = {
    "gsi": ("gsi_rank", "gsi_marginal_loss", "order_place", "order_cost"),
    "one_shot": ("one_shot_loss", "one_shot_cost"),
    "request": ("freed_share",),
    "kind": ("kind", "attn", "ffn", "cache", "embeddings"),
    "depth": ("depth",),
}

ABLATIONS = tuple(_HIDES)
"""Names of the ablations: parts of the input that can be hidden from a network; ``request``
hides the request too."""

OVER_FLOOR = 1e-6
"""Added to the bytes over budget (a share of the peak) before a freed share is divided by
it."""

SPREAD_FLOOR = 1e-4
"""Added to the spread over rows before a deviation is divided by it."""

MOST_SPREADS = 3.0
"""Deviations are clipped at this many spreads."""

_COST_SCALE = float(np.log1p(COST_CEILING / COST_FLOOR))
"""Logs of costs are observed divided by this, see `rap_env.ladder.observation.log_cost`."""

_NEAR_BLOCKS = (-2, -1, 1, 2)
"""Offsets of a block's neighbours: the other block of its layer and those of adjacent
layers."""

_NEAR_ITEMS = tuple((step, kind) for step in (-1, 0, 1) for kind in ("attn", "ffn", "cache"))
"""The neighbours of an item: offsets of layers, and kinds of items in them."""


def _near_blocks(rows: Float32s) -> Numbers:
    """The blocks before and after each block."""
    near = np.arange(len(rows))[:, None] + np.array(_NEAR_BLOCKS)
    return np.where((near >= 0) & (near < len(rows)), near, -1)


def _near_items(rows: Float32s) -> Numbers:
    """The items of each item's layer and of the adjacent ones.

    Items are told apart by their kinds and depths; if either is hidden, all 0, no item has
    neighbours.
    """
    near = np.full((len(rows), len(_NEAR_ITEMS)), -1, dtype=np.int64)
    rows = rows[rows[:, : len(ITEM_KINDS)].any(axis=1)]  # what fills up observations comes last
    if not len(rows):
        return near
    kinds = [ITEM_KINDS[kind] for kind in rows[:, : len(ITEM_KINDS)].argmax(axis=1)]
    in_layer = np.array([kind != "embeddings" for kind in kinds])
    layers = np.full(len(rows), -len(_NEAR_ITEMS))
    depths = rows[in_layer, ITEM_FEATURES.index("depth")]
    layers[in_layer] = np.unique(depths, return_inverse=True)[1]
    numbers = {pair: n for n, pair in enumerate(zip(layers.tolist(), kinds, strict=True))}
    if len(numbers) == len(rows):  # else several layers seem to be one
        near[: len(rows)] = [
            [numbers.get((layer + step, kind), -1) for step, kind in _NEAR_ITEMS]
            for layer in layers.tolist()
        ]
    return near


@dataclass(frozen=True)
class RowSpec:
    """What a network's rows are made of.

    Attributes:
        key: Entry of the observation with the features of each block or item.
        features: Names of these features, F.
        priced: Features for which a row also has the price: the log of the cost per useful
            byte.
        cost_floor: Added to a cost before its log is taken; None if costs are observed as
            logs.
        useful_floor: Added to a useful share before a price is computed.
        level_flag: The feature that is a row's level: 0 is native, 1 the lowest level.
        kind_flags: The features that say whether a row is of each kind.
        neighbours: Gives the number of each neighbour of each row (N, F), -1 without it, (N,
            M).
        num_neighbours: Number of neighbours of each row, M.
        near_kept: Whether neighbours are observed as 1 minus their level.
        means: Whether rows have the mean features of the rows with and without a lower level;
            the mean of the vectors is then that of the latter, otherwise of all.
        lowest_kinds: Number of kinds for which rows have the share at the lowest level.
    """

    key: str
    features: tuple[str, ...]
    priced: tuple[str, ...]
    cost_floor: float | None
    useful_floor: float
    level_flag: str
    kind_flags: tuple[str, ...]
    neighbours: Callable[[Float32s], Numbers]
    num_neighbours: int
    near_kept: bool
    means: bool
    lowest_kinds: int

    @cached_property
    def freed(self) -> int:
        """The column of the share of bytes that the next level frees."""
        return self.features.index("freed_share")

    @cached_property
    def costs(self) -> list[int]:
        """The columns of the priced features."""
        return [self.features.index(name) for name in self.priced]

    def columns(self, vectors: int = 0) -> dict[str, slice]:
        """The parts of a row by name, with the columns of each part.

        Of the block or item: ``features``, ``compared`` (the same and the prices,
        standardised over the rows with a valid action), ``useful`` (the share of the bytes
        over budget that its next level frees, at most 1), ``valid`` (whether it has a lower
        level), ``neighbours`` (their levels as observed, 0 where there is none; or 1 minus
        that, see `near_kept`), ``vectors`` (its learned vector). Of the whole model:
        ``request``, ``mean_valid`` and ``mean_lowest`` (mean features of the rows with and
        without a lower level), ``mean_level`` (of each kind), ``lowest`` (shares of the items
        of the first kinds at their lowest level), ``lowered_vectors`` (mean of the vectors
        times the levels, see `means`).

        Args:
            vectors: Width of each learned vector, V; 0 for none.
        """
        features = len(self.features)
        widths = {
            "features": features,
            "compared": features + len(self.priced),
            "useful": 1,
            "valid": 1,
            "neighbours": self.num_neighbours,
            "vectors": vectors,
            "request": len(REQUEST_FEATURES),
            "mean_valid": features * self.means,
            "mean_lowest": features * self.means,
            "mean_level": len(self.kind_flags),
            "lowest": self.lowest_kinds,
            "lowered_vectors": vectors,
        }
        columns, start = {}, 0
        for name, width in widths.items():
            columns[name] = slice(start, start + width)
            start += width
        return columns

    def width(self, vectors: int = 0) -> int:
        """Number of columns of a row, W."""
        return int(self.columns(vectors)["lowered_vectors"].stop)

    def shown(self, without: Collection[str]) -> tuple[Float32s, Float32s]:
        """1 for features, and for prices, that a network sees; 0 for those that ablations hide."""
        hidden = {column for name in without for column in _HIDES[name]}
        features, prices = (
            np.array([float(name not in hidden) for name in names], dtype=np.float32)
            for names in (self.features, self.priced)
        )
        return features, prices

    def log_costs(self, costs: Any, log: Any) -> Any:
        """The logs of observed costs, an array or a tensor, by the `log` of its library."""
        return costs * _COST_SCALE if self.cost_floor is None else log(costs + self.cost_floor)

    def level(self, rows: Any) -> Any:
        """The observed levels, (..., N), of rows (..., N, F)."""
        return self._flag(rows, self.level_flag)

    def kinds(self, rows: Any) -> list[Any]:
        """Whether rows, (..., N, F), are of each kind: 0 or 1, an array (..., N) for each kind."""
        return [self._flag(rows, flag) for flag in self.kind_flags]

    def _flag(self, rows: Any, flag: str) -> Any:
        """A feature of rows by its name, or 1 minus it behind the word ``not``."""
        values = rows[..., self.features.index(flag.removeprefix("not "))]
        return 1 - values if flag.startswith("not ") else values


BLOCK_ROWS = RowSpec(
    key="blocks",
    features=BLOCK_FEATURES,
    priced=("one_shot_loss", "gsi_marginal_loss"),
    cost_floor=1e-2,
    useful_floor=1e-3,
    level_flag="not kept",
    kind_flags=("not kind", "kind"),
    neighbours=_near_blocks,
    num_neighbours=len(_NEAR_BLOCKS),
    near_kept=True,
    means=True,
    lowest_kinds=0,
)
"""Rows of the blocks of `RAPPrune-v0`."""

ITEM_ROWS = RowSpec(
    key="ladder",
    features=ITEM_FEATURES,
    priced=("one_shot_cost", "order_cost"),
    cost_floor=None,
    useful_floor=1e-5,  # one cache is a small share of a model
    level_flag="level",
    kind_flags=ITEM_KINDS,
    neighbours=_near_items,
    num_neighbours=len(_NEAR_ITEMS),
    near_kept=False,
    means=False,
    lowest_kinds=2,
)
"""Rows of the items of `RAPLadder-v0`; those of attn and of ffn items come first of the
kinds."""

ROWS: dict[str, RowSpec] = {spec.key: spec for spec in (BLOCK_ROWS, ITEM_ROWS)}
"""The kinds of rows, by their entry of an observation."""
