"""The input row of a block-wise policy network for each block: its columns and constants.

Training (`agents.networks`, in torch) and the runtime (`rap_env.policies.block_network`, in
NumPy) build the same rows from these definitions.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from rap_env.ladder.observation import BLOCK_FEATURES, REQUEST_FEATURES

NEIGHBOURS = (-2, -1, 1, 2)
"""Offsets of a block's neighbours: the other block of its layer and those of adjacent layers."""

PRICED = ("one_shot_loss", "gsi_marginal_loss")
"""Features for which a row also has the price: the log of importance per useful byte."""

HIDES = {
    "gsi": ("gsi_rank", "gsi_marginal_loss", "order_place", "order_cost"),
    "one_shot": ("one_shot_loss", "one_shot_cost"),
    "request": ("freed_share",),
    "kind": ("kind", "attn", "ffn", "cache", "embeddings"),
    "depth": ("depth",),
}
"""The columns of blocks and items that each ablation hides; ``request`` hides the request too."""

ABLATIONS = tuple(HIDES)
"""Names of the ablations: parts of the input that can be hidden from a network."""

OVER_FLOOR = 1e-6
"""Added to the bytes over budget (a share of the peak) before a freed share is divided by it."""

IMPORTANCE_FLOOR = 1e-2
"""Added to an importance before its price is computed."""

USEFUL_FLOOR = 1e-3
"""Added to a useful share before a price is computed."""

SPREAD_FLOOR = 1e-4
"""Added to the spread over blocks before a deviation is divided by it."""

MOST_SPREADS = 3.0
"""Deviations are clipped at this many spreads."""


def row_columns(block_vectors: int = 0) -> dict[str, slice]:
    """The parts of a row by name, with the columns of each part.

    Of the block: ``blocks`` (its features), ``compared`` (the same and the prices, standardised
    over the kept blocks), ``useful`` (the share of the bytes over budget that its removal frees,
    at most 1), ``kept``, ``neighbours`` (whether they are kept; 1 beyond the ends), ``vectors``
    (its learned vector). Of the whole model: ``request``, ``mean_kept`` and ``mean_removed`` (mean
    features of the kept and of the removed blocks), ``removed_by_kind`` (removed shares of the
    attn and of the ffn blocks), ``removed_vectors`` (mean over the removed blocks).

    Args:
        block_vectors: Width of each block's learned vector, 0 for none.
    """
    features = len(BLOCK_FEATURES)
    widths = {
        "blocks": features,
        "compared": features + len(PRICED),
        "useful": 1,
        "kept": 1,
        "neighbours": len(NEIGHBOURS),
        "vectors": block_vectors,
        "request": len(REQUEST_FEATURES),
        "mean_kept": features,
        "mean_removed": features,
        "removed_by_kind": 2,
        "removed_vectors": block_vectors,
    }
    return columns_of(widths)


def columns_of(widths: Mapping[str, int]) -> dict[str, slice]:
    """The columns of parts that stand side by side, from the width of each."""
    columns, start = {}, 0
    for name, width in widths.items():
        columns[name] = slice(start, start + width)
        start += width
    return columns


def row_width(block_vectors: int = 0) -> int:
    """Number of columns of a row, W."""
    return width_of(row_columns(block_vectors))


def width_of(columns: Mapping[str, slice]) -> int:
    """Number of columns of all parts together."""
    return int(list(columns.values())[-1].stop)


def shown(names: Sequence[str], without: Collection[str]) -> npt.NDArray[np.float32]:
    """1 for each feature that a network sees, 0 for those that the ablations `without` hide."""
    hidden = {column for name in without for column in HIDES[name]}
    return np.array([float(name not in hidden) for name in names], dtype=np.float32)
