"""Tables of how much orders of importance, and what follows from them, depend on the text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from experiments.comparison.formatting import Table, look, markdown, percent, plain, wrapped
from experiments.studies.agreement import Agreement, agreements
from experiments.studies.rows import OrderRow, StudyRow

AGREEMENT_CAPTION = (
    "Kendall's tau of the importance of all blocks (one-shot) or of their places in the order "
    "(GSI), mean over pairs of draws with the least and the largest, and the share of the first "
    "k blocks that both orders have."
)
LOSS_CAPTION = (
    "Loss on one report text (nats per token over the dense model) of the masks that follow from "
    "the importance on each text: mean and standard deviation over draws of the text; last, the "
    "standard deviation of the means over texts."
)


def agreement_table(orders: Sequence[OrderRow], top: Sequence[int]) -> Table:
    """Agreement between draws of one text, of two, and of all."""
    found = list(agreements(orders, top))
    known = sorted({k for pair in found for k in pair.overlaps})
    header = ["Importance", "Texts", "Pairs", "Kendall's tau", *[f"first {k}" for k in known]]
    rows = []
    for method in dict.fromkeys(pair.method for pair in found):
        for name, pairs in _groups([pair for pair in found if pair.method == method]).items():
            taus = [pair.tau for pair in pairs]
            spread = f"{np.mean(taus):.2f} [{min(taus):.2f}, {max(taus):.2f}]"
            shares = [_mean_overlap(pairs, k) for k in known]
            rows.append([look(method).label, name, f"{len(pairs)}", spread, *shares])
    return header, rows


def text_loss_table(rows: Sequence[StudyRow]) -> Table:
    """One line a method and cell, a column a text."""
    texts = list(dict.fromkeys(row.searched_on for row in rows))
    header = ["Method", "Request", *texts, "over texts"]
    lines = []
    for method in dict.fromkeys(row.method for row in rows):
        for cell in dict.fromkeys(row.cell for row in rows):
            own = [row for row in rows if (row.method, row.cell) == (method, cell)]
            by_text = {t: [r.loss for r in own if r.searched_on == t] for t in texts}
            means = [float(np.mean(losses)) for losses in by_text.values() if losses]
            name = f"{cell[0]}x{cell[1]} @ {percent(cell[2], 0)}"
            lines.append(
                [look(method).label, name, *map(_mean_and_spread, by_text.values()),
                 f"{np.std(means):.3f}"]
            )  # fmt: skip
    return header, lines


def stability_text(orders: Sequence[OrderRow], rows: Sequence[StudyRow], top: Sequence[int]) -> str:
    """Both tables for the terminal."""
    parts = [plain(agreement_table(orders, top)), wrapped(AGREEMENT_CAPTION)]
    if rows:
        parts += [plain(text_loss_table(rows)), wrapped(LOSS_CAPTION)]
    return "\n\n".join(parts)


def stability_markdown(
    orders: Sequence[OrderRow], rows: Sequence[StudyRow], top: Sequence[int]
) -> str:
    """Both tables in Markdown."""
    parts = ["# Stability\n", AGREEMENT_CAPTION + "\n", markdown(agreement_table(orders, top))]
    if rows:
        parts += [LOSS_CAPTION + "\n", markdown(text_loss_table(rows))]
    return "\n".join(parts)


def _groups(pairs: Sequence[Agreement]) -> dict[str, list[Agreement]]:
    """Pairs by what they compare; those of all texts first."""
    groups: dict[str, list[Agreement]] = {
        "same text, other draw": [pair for pair in pairs if pair.same_text],
        "other text": [pair for pair in pairs if not pair.same_text],
    }
    for pair in pairs:
        one, two = pair.texts
        name = f"{one}, other draw" if pair.same_text else f"{one} - {two}"
        groups.setdefault(name, []).append(pair)
    return {name: group for name, group in groups.items() if group}


def _mean_overlap(pairs: Sequence[Agreement], k: int) -> str:
    shares = [pair.overlaps[k] for pair in pairs if k in pair.overlaps]
    return percent(float(np.mean(shares)), 0) if shares else "-"


def _mean_and_spread(losses: Sequence[float]) -> str:
    if not losses:
        return "-"
    return f"{np.mean(losses):.3f} ± {np.std(losses):.3f}"
