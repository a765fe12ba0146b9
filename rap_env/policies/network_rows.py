"""The input row of a policy network for each action: its columns and constants.

`RowSpec.parts` makes the rows, in torch for training (`agents.networks`) and in NumPy for the
runtime (`rap_env.policies.network`). A row is made from an observation: of blocks
(`RAPPrune-v0`) or of the items of a ladder (`RAPLadder-v0`).

Shapes: B observations, N blocks or items, F observed features of each, R entries of the request,
V entries of a learned vector.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from rap_env.ladder.features import (
    BLOCK_FEATURES,
    BYTES_OVER,
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

_OVER_FLOOR = 1e-6
"""Added to the bytes over budget (a share of the peak) before a freed share is divided by
it."""

_SPREAD_FLOOR = 1e-4
"""Added to the spread over rows before a deviation is divided by it."""

_MOST_SPREADS = 3.0
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

    def shown(self, without: Collection[str]) -> tuple[Float32s, Float32s, Float32s]:
        """1 for features, prices and the request if a network sees them, 0 if they are hidden.

        Args:
            without: Names of `ABLATIONS`.
        """
        hidden = {column for name in without for column in _HIDES[name]}
        features, prices = (
            np.array([float(name not in hidden) for name in names], dtype=np.float32)
            for names in (self.features, self.priced)
        )
        request = np.full(len(REQUEST_FEATURES), "request" not in without, dtype=np.float32)
        return features, prices, request

    def parts(
        self,
        lib: Any,
        seen: Mapping[str, Any],
        shown: tuple[Any, Any, Any],
        near: Any,
        vectors: Any,
    ) -> tuple[Any, Any]:
        """The columns of rows, those of each row's own and those of the whole model.

        Args:
            lib: The library of all arrays, numpy or torch.
            seen: Observations, float32: ``request`` (B, R), the features of the rows (B, N, F)
                and ``action_mask`` (B, N).
            shown: As `shown` gives it.
            near: As `neighbours` gives it, (B, N, M).
            vectors: The learned vectors, (N, V).

        Returns:
            The columns before ``vectors``, (B, N, O), and those after it, (B, S); see `columns`.
        """
        features, prices, of_request = shown
        each, request = seen[self.key] * features, seen["request"] * of_request
        valid = seen["action_mask"]
        over = request[:, BYTES_OVER, None] + _OVER_FLOOR
        useful = (each[..., self.freed] / over).clip(max=1) * valid
        log_costs = each[..., self.costs]
        if self.cost_floor is None:
            log_costs = log_costs * _COST_SCALE
        else:
            log_costs = lib.log(log_costs + self.cost_floor)
        log_prices = log_costs - lib.log(useful + self.useful_floor)[..., None]
        compared = lib.concatenate([each, log_prices * prices], -1)
        level = self._flag(each, self.level_flag)
        lowest = lib.ones_like(level) * (level >= 1)
        kinds = lib.stack([self._flag(each, flag) for flag in self.kind_flags], -1)
        levels = lib.concatenate([level, lib.zeros_like(level[:, :1])], 1)  # 0 where near is -1
        near_levels = levels[lib.arange(len(near))[:, None, None], near]
        own = [
            each,
            _standardised(lib, compared, valid),
            useful[..., None],
            valid[..., None],
            1 - near_levels if self.near_kept else near_levels,
        ]
        shared, lowered = [request], level / level.shape[1]
        if self.means:
            shared += [_mean(each, valid), _mean(each, lowest)]
            lowered = lowest / lowest.sum(1)[:, None].clip(min=1)
        shared += [_by_kind(kinds, level), _by_kind(kinds[..., : self.lowest_kinds], lowest)]
        shared.append(lowered @ vectors)
        return lib.concatenate(own, -1), lib.concatenate(shared, -1)

    def _flag(self, rows: Any, flag: str) -> Any:
        """A feature of rows, (B, N), by its name, or 1 minus it behind the word ``not``."""
        values = rows[..., self.features.index(flag.removeprefix("not "))]
        return 1 - values if flag.startswith("not ") else values


def _mean(values: Any, weight: Any) -> Any:
    """The mean over rows (B, N, F) with weights (B, N), (B, F); 0 if all weights are 0."""
    return (weight[:, None] @ values)[:, 0] / weight.sum(1)[:, None].clip(min=1)


def _by_kind(kinds: Any, values: Any) -> Any:
    """The mean of values (B, N) over each kind (B, N, kinds), (B, kinds); 0 if there is none."""
    return (values[:, None] @ kinds)[:, 0] / kinds.sum(1).clip(min=1)


def _standardised(lib: Any, values: Any, valid: Any) -> Any:
    """Deviations from the mean over the valid rows, in units of their spread; 0 for others."""
    centred = (values - _mean(values, valid)[:, None]) * valid[..., None]
    spread = lib.sqrt(_mean(centred * centred, valid))[:, None]
    return (centred / (spread + _SPREAD_FLOOR)).clip(-_MOST_SPREADS, _MOST_SPREADS)


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
