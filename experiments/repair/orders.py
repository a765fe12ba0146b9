"""How stubs change the order in which blocks are missed least, as a record and as a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.comparison.formatting import Table, look
from experiments.comparison.records import read_json
from rap_env.artifacts import atomic_write

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rap_env.importance import GSIProfile

FILE = "orders.json"
_PLAIN = "none"
_STEPS = (5, 10, 15, 20)


def write_orders(path: Path, profiles: Mapping[str, GSIProfile]) -> None:
    """Write GSI orders by repair: names of blocks, and the loss after each removal."""
    record = {
        name: {
            "method": profile.method,
            "order": [block.name for block in profile.order],
            "loss_after": [nll - profile.dense_nll for nll in profile.nll_after],
            "calibration_sha256": profile.provenance["text"]["sha256"],
            "stubs": profile.provenance["scoring"].get("repair", ""),
        }
        for name, profile in profiles.items()
    }
    with atomic_write(path) as file:
        file.write(json.dumps(record, indent=1, allow_nan=False).encode() + b"\n")


def read_orders(path: Path) -> dict[str, Any]:
    """What `write_orders` wrote; nothing if there is no file.

    Raises:
        ArtifactError: The file is damaged.
    """
    return read_json(path, made_by="experiments.repair") or {}


def orders_table(orders: Mapping[str, Any]) -> Table | None:
    """Loss after some removals in GSI's order, and how many of the first it shares with plain."""
    if _PLAIN not in orders:
        return None
    most = min(len(entry["order"]) for entry in orders.values())
    steps = [step for step in _STEPS if step <= most] or [most]
    shared_of = min(10, most)
    first = set(orders[_PLAIN]["order"][:shared_of])
    header = ["GSI order", *[f"{step} removed" for step in steps],
              f"first {shared_of} shared with no stubs", f"attn of first {most}"]  # fmt: skip
    rows = [
        [
            look(name).label,
            *[f"{entry['loss_after'][step - 1]:.3f}" for step in steps],
            f"{len(first & set(entry['order'][:shared_of]))}",
            f"{sum(block.endswith('.attn') for block in entry['order'][:most])}",
        ]
        for name, entry in orders.items()
    ]
    return header, rows


ORDERS_CAPTION = (
    "Loss on the calibration text (nats per token over the dense model) when blocks go in the "
    "order of greedy sequential importance, measured anew with each kind of stub in place."
)
"""What the numbers of `orders_table` are."""
