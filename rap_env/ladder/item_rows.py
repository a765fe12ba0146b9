"""The input row of an item-wise policy network for each item: its columns and constants.

They are for `RAPLadder-v0` what `rap_env.block_rows` has for `RAPPrune-v0`. Training
(`agents.networks`, in torch) and the runtime (`rap_env.policies.item_network`, in NumPy) build
the same rows from these definitions.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from rap_env.block_rows import columns_of
from rap_env.costs import Counts
from rap_env.ladder.items import KINDS
from rap_env.ladder.observation import COST_CEILING, COST_FLOOR, ITEM_FEATURES, REQUEST_FEATURES

PRICED = ("one_shot_cost", "order_cost")
"""Features for which a row also has the price: the log of the cost per useful byte."""

NEIGHBOURS = tuple((step, kind) for step in (-1, 0, 1) for kind in ("attn", "ffn", "cache"))
"""The neighbours of an item: offsets of layers, and kinds of items in them."""

COST_SCALE = float(np.log1p(COST_CEILING / COST_FLOOR))
"""Logs of costs are observed divided by this, see `rap_env.ladder.observation.log_cost`."""

USEFUL_FLOOR = 1e-5
"""Added to a useful share before a price is computed; one cache is a small share of a model."""

DEPTH, LEVEL = ITEM_FEATURES.index("depth"), ITEM_FEATURES.index("level")


def row_columns(item_vectors: int = 0) -> dict[str, slice]:
    """The parts of a row by name, with the columns of each part.

    Of the item: ``items`` (its features), ``compared`` (the same and the prices, standardised over
    the items that have a lower level), ``useful`` (the share of the bytes over budget that its
    next level frees, at most 1), ``valid`` (whether it has a lower level), ``neighbours`` (their
    levels as observed; 0 where there is no such item), ``vectors`` (its learned vector). Of the
    whole model: ``request``, ``mean_level`` (mean level of each kind of item), ``lowest`` (shares
    of the attn and of the ffn items at their lowest level, which is removal if the ladder has it),
    ``lowered_vectors`` (mean of the vectors times the levels).

    Args:
        item_vectors: Width of each item's learned vector, 0 for none.
    """
    return columns_of(
        {
            "items": len(ITEM_FEATURES),
            "compared": len(ITEM_FEATURES) + len(PRICED),
            "useful": 1,
            "valid": 1,
            "neighbours": len(NEIGHBOURS),
            "vectors": item_vectors,
            "request": len(REQUEST_FEATURES),
            "mean_level": len(KINDS),
            "lowest": 2,
            "lowered_vectors": item_vectors,
        }
    )


def neighbours(items: npt.NDArray[np.float32]) -> Counts:
    """The number of each neighbour of each item, -1 where there is none, (N, 9).

    Args:
        items: The observed features of the items, (N, F); their kinds and depths count. Layers
            are told apart by their depth. If kinds or depths are hidden, all 0, no item has
            neighbours.
    """
    none = np.full((len(items), len(NEIGHBOURS)), -1, dtype=np.int64)
    if not items[:, : len(KINDS)].any():
        return none
    kinds = [KINDS[kind] for kind in items[:, : len(KINDS)].argmax(axis=1)]
    in_layer = np.array([kind != "embeddings" for kind in kinds])
    layers = np.full(len(items), -len(NEIGHBOURS))
    layers[in_layer] = np.unique(items[in_layer, DEPTH], return_inverse=True)[1]
    numbers = {pair: n for n, pair in enumerate(zip(layers.tolist(), kinds, strict=True))}
    if len(numbers) < len(items):  # several layers seem to be one
        return none
    return np.array(
        [[numbers.get((layer + step, kind), -1) for step, kind in NEIGHBOURS] for layer in layers],
        dtype=np.int64,
    )
