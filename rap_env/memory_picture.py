"""A plot of what fills the memory: weights for short requests, the KV cache for long ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rap_env.extras import require_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PARTS = {
    "ffn_weights": ("FFN weights", "#E0812F"),
    "attn_weights": ("attention weights", "#2F6DB5"),
    "kv_cache": ("KV cache", "#9CC3E6"),
    "embeddings": ("embeddings and head", "#B9B4A8"),
    "workspace": ("workspace (estimate)", "#DEDAD0"),
}
"""The parts from the bottom up, with label and colour; the KV cache is a lighter attention blue."""


def draw_memory(
    shares: Sequence[dict[str, Any]],
    *,
    columns: int | None = None,
    width_in: float = 9.2,
    row_height_in: float = 2.9,
) -> Figure:
    """Plot rows of `MemoryModel.shares` against sequence length, one panel per batch size.

    All panels are side by side unless `columns` says how many.
    """
    require_extra("plots", "The memory picture")
    from matplotlib.figure import Figure

    batches = sorted({row["batch_size"] for row in shares})
    columns = columns or len(batches)
    rows = -(-len(batches) // columns)
    figure = Figure(figsize=(width_in, row_height_in * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True, sharex=True)
    for place, (axis, batch) in enumerate(zip(grid.flat, batches, strict=False)):
        _draw_batch(axis, [row for row in shares if row["batch_size"] == batch])
        axis.set_title(f"batch {batch}", fontsize=9)
        axis.label_outer()
        axis.set_xlabel("sequence length (tokens)" if place >= (rows - 1) * columns else "")
    figure.supylabel("share of peak memory (%)", fontsize=9)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(
        handles[::-1], labels[::-1], loc="outside lower center", ncols=min(5, 2 * columns)
    )
    return figure


def _draw_batch(axis: Axes, shares: list[dict[str, Any]]) -> None:
    shares = sorted(shares, key=lambda row: row["seq_len_tokens"])
    tokens = [row["seq_len_tokens"] for row in shares]
    axis.stackplot(
        tokens,
        *[[100 * row[part] for row in shares] for part in PARTS],
        colors=[colour for _, colour in PARTS.values()],
        labels=[label for label, _ in PARTS.values()],
        linewidth=0.6,
        edgecolor="white",
    )
    axis.set_xscale("log", base=2)
    axis.set_xticks(tokens[::2], [_short_count(count) for count in tokens[::2]])
    if len(tokens) > 1:
        axis.set_xlim(tokens[0], tokens[-1])
    axis.set_ylim(0, 100)
    axis.grid(False)


def _short_count(tokens: int) -> str:
    """Format 1,024 tokens as ``1k``."""
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)
