"""Tables of what stubs recover: ΔNLL, ratios to no stubs, accuracy, and GSI orders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.repair.records import RepairRow
from experiments.repair.summaries import PLAIN, RepairComparison
from experiments.study.looks import look
from experiments.study.records import Cell
from experiments.study.statistics import Estimate
from experiments.study.tables import (
    TIMES,
    Table,
    TitledTable,
    counted,
    document,
    mebibytes,
    number,
    percent,
)

ARROW = " \N{RIGHTWARDS ARROW} "

SAME_MASKS = (
    "Each library is evaluated under the masks that the search with the whole library chose "
    "(except where own masks are stated), and compared, cell by cell, with removal without stubs "
    "under the masks of its own search."
)
"""Caption of the studies of tokens and domains."""


ORDERS_CAPTION = (
    "ΔNLL on the calibration text (nats/token) when blocks are removed in the order of greedy "
    "sequential importance, measured again with each kind of stub in place."
)
"""Caption of `orders_table`."""
_ORDER_STEPS = (5, 10, 15, 20)


def repair_summary_table(found: RepairComparison) -> Table:
    """One row per repair: mean ΔNLL and ratio on texts of fitted domains and on others."""
    header = ["Repair", "ΔNLL, fitted", "Ratio", "ΔNLL, other", "Ratio", "Accuracy", "Tokens",
              "Fits"]  # fmt: skip
    rows = [
        [
            look(s.repair).label, _mean(s.fitted), repair_ratio(s.fitted_ratio), _mean(s.other),
            repair_ratio(s.other_ratio), percent(s.accuracy), number(s.fit_tokens),
            f"{s.fitting}/{s.cells}",
        ]
        for s in found.summaries
    ]  # fmt: skip
    return header, rows


def repair_grid_table(found: RepairComparison) -> Table:
    """One line per request and budget: ΔNLL of all repairs on each text, and removed blocks."""
    header = ["Request", "Budget", *[text_label(found, text) for text in found.texts],
              "Blocks removed"]  # fmt: skip
    rows = []
    for cell in found.cells:
        deltas = [
            _chain([_row_delta(found.at(repair, cell, text)) for repair in found.repairs])
            for text in found.texts
        ]
        removed = _chain([_removed(_row_at(found, repair, cell)) for repair in found.repairs])
        rows.append([_request(cell), _budget(found, cell), *deltas, removed])
    return header, rows


def repair_text_table(found: RepairComparison, text: str) -> Table:
    """ΔNLL with interval and peak memory on one text: a line per request, a column per repair."""
    header = ["Request", "Budget", *[look(repair).label for repair in found.repairs]]
    rows = [
        [
            _request(cell), _budget(found, cell),
            *[_delta_and_peak(found.at(repair, cell, text)) for repair in found.repairs],
        ]
        for cell in found.cells
    ]  # fmt: skip
    return header, rows


def repair_accuracy_table(found: RepairComparison) -> Table | None:
    """Mean accuracy of each task over the cells; None without tasks."""
    rows = [row for row in found.study("grid") if row.accuracies]
    tasks = sorted({task for row in rows for task in row.accuracies})
    lines = []
    if tasks and set(tasks) <= found.dense_accuracies.keys():
        lines.append(["Dense model", *_accuracy_cells([found.dense_accuracies], tasks)])
    for repair in found.repairs:
        own = [row for row in rows if row.repair == repair and set(tasks) == set(row.accuracies)]
        cells = list({row.cell: row.accuracies for row in own}.values())
        if cells:
            lines.append([look(repair).label, *_accuracy_cells(cells, tasks)])
    return (["Repair", *tasks, "mean"], lines) if lines else None


def token_table(found: RepairComparison) -> Table | None:
    """Ratio to no stubs for each number of fitting tokens and text; None without that study."""
    rows = [[f"{count:,}", *_ratios(found, own)] for count, own in found.token_rows.items()]
    header = ["Fitting tokens", *[text_label(found, text) for text in found.texts]]
    return (header, rows) if rows else None


def domain_table(found: RepairComparison) -> Table | None:
    """Ratio to no stubs: texts fitted on as lines, reported on as columns; None without."""
    lines: dict[tuple[tuple[str, ...], int], list[RepairRow]] = {}
    for row in found.study("domain"):
        lines.setdefault((tuple(row.fitted_on), row.fit_tokens), []).append(row)
    if not lines:
        return None
    cells = {row.cell for row in found.study("domain")}
    for row in found.study("grid"):
        if row.repair == "library" and row.cell in cells:
            lines.setdefault((tuple(row.fitted_on), row.fit_tokens), []).append(row)
    for row in found.study("alone"):
        if row.cell in cells:
            own = (f"{'+'.join(row.fitted_on)}, own masks",)
            lines.setdefault((own, row.fit_tokens), []).append(row)
    header = ["Fitted on", "Tokens", *found.texts]
    rows = [
        [" + ".join(names), f"{count:,}", *_ratios(found, own)]
        for (names, count), own in lines.items()
    ]
    return header, rows


def orders_table(orders: Mapping[str, Any]) -> Table | None:
    """ΔNLL after some removals in GSI order, and the overlap with the order without stubs."""
    if PLAIN not in orders:
        return None
    measured = min(len(entry["order"]) for entry in orders.values())
    steps = [step for step in _ORDER_STEPS if step <= measured] or [measured]
    shared_of = min(10, measured)
    first = set(orders[PLAIN]["order"][:shared_of])
    header = ["GSI order", *[f"{step} removed" for step in steps],
              f"first {shared_of} shared with no stubs", f"attn of first {measured}"]  # fmt: skip
    rows = [
        [
            look(name).label,
            *[f"{entry['loss_after'][step - 1]:.3f}" for step in steps],
            f"{len(first & set(entry['order'][:shared_of]))}",
            f"{sum(block.endswith('.attn') for block in entry['order'][:measured])}",
        ]
        for name, entry in orders.items()
    ]
    return header, rows


def targets_table(found: RepairComparison) -> Table | None:
    """Targets with the measured ratios; None if no target was measured."""
    alone = [row for row in found.study("alone") if row.fitted_on == ["self"]]
    alone = alone or [row for row in found.study("domain") if row.fitted_on == ["self"]]
    by_text = [found.ratio([row for row in alone if row.text == text]) for text in found.texts]
    known = [ratio for ratio in by_text if ratio]
    targets = [
        ("library against plain, texts not fitted on", 0.75, found.ratio_of("library", other=True)),
        ("distilled, texts not fitted on", 0.6, found.ratio_of("distilled", other=True)),
        ("library, held-out text of a fitted domain", 0.6, found.ratio_of("library", other=False)),
        ("fitted on self-written text alone, worst text", 0.8,
         max(known, key=lambda ratio: ratio.mean) if known else None),
    ]  # fmt: skip
    rows = [
        [
            name,
            repair_ratio(measured),
            f"at most {target:g}",
            "yes" if measured.mean <= target else "no",
        ]
        for name, target, measured in targets
        if measured
    ]
    return (["Ratio to no stubs", "Measured", "Target", "Met"], rows) if rows else None


def grid_caption(found: RepairComparison) -> str:
    """Caption of `repair_grid_table`."""
    chain = _chain([look(repair).label for repair in found.repairs])
    own = "; stubs fitted per mask use that of the library" if "per_mask" in found.repairs else ""
    return (
        f"ΔNLL in nats/token; each cell holds: {chain}. Removed blocks (attn+ffn) are in the same "
        "order, given once if equal. Each repair has its own mask, found by greedy search at the "
        f"same budget, stubs included{own}."
    )


def summary_caption(found: RepairComparison) -> str:
    """Caption of `repair_summary_table`."""
    windows = sum({row.text: len(row.window_losses) for row in found.rows}.values())
    over = f"{counted(len(found.cells), 'cell')} (a request at a budget) and "
    over += counted(len(found.texts), "text")
    if found.incomplete:
        over += f", restricted to those that all repairs have ({len(found.pairs)} of "
        over += f"{len(found.cells) * len(found.texts)} pairs)"
    return (
        f"Mean ΔNLL in nats/token over {over}. Fitted: held-out text of the domains that stubs "
        "were fitted on; other: texts of other domains. Ratio: mean ΔNLL divided by that without "
        "stubs; lower is better, 1 means no recovery. Intervals are 95 % percentile bootstrap over "
        f"{windows} windows of report text, resampled jointly for both values of a ratio. Tokens: "
        "tokens that stubs were fitted on. Fits: masks within their budget."
    )


def repair_document(
    found: RepairComparison, orders: Mapping[str, Any] | None = None
) -> list[TitledTable]:
    """Return every table with its title and caption; tables without rows are left out."""
    tables: list[TitledTable] = []
    if found.summaries:
        table, caption = repair_summary_table(found), summary_caption(found)
        tables.append(TitledTable(table, caption=caption, name="summary"))
    if targets := targets_table(found):
        tables.append(TitledTable(targets, "Targets", name="targets", by_method=False))
    if found.cells:
        title = "ΔNLL at each request and budget"
        tables.append(
            TitledTable(
                repair_grid_table(found), title, grid_caption(found), name="grid", by_method=False
            )
        )
    for text in found.texts if found.cells else []:
        title = f"ΔNLL with interval and peak memory, {text_label(found, text)}"
        tables.append(
            TitledTable(repair_text_table(found, text), title, detail=True, by_method=False)
        )
    if accuracy := repair_accuracy_table(found):
        title = "Accuracy of each task, mean over the cells"
        tables.append(TitledTable(accuracy, title, name="accuracy"))
    if tokens := token_table(found):
        title = "Ratio to no stubs against fitting tokens"
        tables.append(TitledTable(tokens, title, SAME_MASKS, name="tokens", by_method=False))
    if domains := domain_table(found):
        title = "Ratio to no stubs: fitted on (lines), reported on (columns)"
        tables.append(TitledTable(domains, title, SAME_MASKS, name="domains", by_method=False))
    if ordered := orders_table(orders or {}):
        title = "The order of importance, with stubs in place"
        tables.append(TitledTable(ordered, title, ORDERS_CAPTION, name="orders"))
    return tables


def repair_markdown(found: RepairComparison, orders: Mapping[str, Any] | None = None) -> str:
    """Return every table, for ``repair_tables.md``; arguments as for `repair_document`."""
    parts = sorted(repair_document(found, orders), key=lambda part: part.detail)
    return f"# Repair\n\n{document(parts, captions=True)}"


def repair_ratio(ratio: Estimate | None) -> str:
    """A ratio with its interval, or a dash; the reference itself is 1 without an interval."""
    if not ratio:
        return "-"
    if ratio.low == ratio.high == 1:
        return "1"
    return f"{ratio.mean:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"


def text_label(found: RepairComparison, text: str) -> str:
    """Name of a report text, marked if no stub was fitted on its domain."""
    return f"{text} (not fitted on)" if found.is_other(text) else text


def _accuracy_cells(cells: Sequence[Mapping[str, float]], tasks: Sequence[str]) -> list[str]:
    """Mean accuracy of each task, and over all tasks."""
    means = [sum(cell[task] for cell in cells) / len(cells) for task in tasks]
    return [percent(mean) for mean in [*means, sum(means) / len(means)]]


def _ratios(found: RepairComparison, rows: Sequence[RepairRow]) -> list[str]:
    """Ratio to no stubs on each text."""
    by_text = [[row for row in rows if row.text == text] for text in found.texts]
    return [repair_ratio(found.ratio(own)) for own in by_text]


def _chain(parts: Sequence[str]) -> str:
    """The common value of all repairs, or else their values in order."""
    return parts[0] if len(set(parts)) == 1 else ARROW.join(parts)


def _request(cell: Cell) -> str:
    return f"{cell[0]} {TIMES} {cell[1]:,}"


def _budget(found: RepairComparison, cell: Cell) -> str:
    size = next(row.budget_bytes for row in found.study("grid") if row.cell == cell)
    return f"{percent(cell[2], 0)} ({mebibytes(size)})"


def _mean(delta: Estimate | None) -> str:
    return f"{delta.mean:.3f}" if delta else "-"


def _row_delta(row: RepairRow | None) -> str:
    return f"{row.loss:.2f}" if row else "-"


def _row_at(found: RepairComparison, repair: str, cell: Cell) -> RepairRow | None:
    """The row on any text: the mask is the same on all texts."""
    rows = [found.at(repair, cell, text) for text in found.texts]
    return next((row for row in rows if row), None)


def _removed(row: RepairRow | None) -> str:
    if not row:
        return "-"
    attn = sum(name.endswith(".attn") for name in row.mask)
    return f"{attn}+{len(row.mask) - attn}"


def _delta_and_peak(row: RepairRow | None) -> str:
    if not row:
        return ""
    delta = Estimate(row.loss, row.loss_ci_low, row.loss_ci_high)
    misses = " (does not fit)" if row.peak_bytes > row.budget_bytes else ""
    return f"{delta}, {mebibytes(row.peak_bytes)}{misses}"
