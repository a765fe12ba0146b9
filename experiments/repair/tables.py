"""Tables of what stubs recover, and findings from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from experiments.repair.rows import PLAIN, RepairComparison, RepairRow, mean_delta_nll
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


def repair_tables(data: RepairComparison) -> list[TitledTable]:
    """Every table that there are rows for."""
    title, grid = "ΔNLL at each request and budget", _grid_caption(data)
    tables = [
        TitledTable(_summary_table(data), caption=_summary_caption(data), name="summary"),
        TitledTable(_targets_table(data), "Targets", name="targets", by_method=False),
        TitledTable(_grid_table(data), title, grid, name="grid", by_method=False),
        TitledTable(
            _accuracy_table(data), "Accuracy of each task, mean over the cells", name="accuracy"
        ),
        TitledTable(
            _token_table(data), "Ratio to no stubs against fitting tokens", SAME_MASKS,
            name="tokens", by_method=False,
        ),
        TitledTable(
            _domain_table(data), "Ratio to no stubs: fitted on (lines), reported on (columns)",
            SAME_MASKS, name="domains", by_method=False,
        ),
        TitledTable(
            _orders_table(data), "The order of importance, with stubs in place", ORDERS_CAPTION,
            name="orders",
        ),
    ]  # fmt: skip
    for text in data.texts:
        title = f"ΔNLL with interval and peak memory, {_text_label(data, text)}"
        tables.append(TitledTable(_text_table(data, text), title, detail=True, by_method=False))
    return [part for part in tables if part.table[1]]


def repair_markdown(data: RepairComparison) -> str:
    """Every table with its caption in Markdown, below a title."""
    return f"# Repair\n\n{document(repair_tables(data), captions=True)}"


def _summary_table(data: RepairComparison) -> Table:
    """One row per repair: mean ΔNLL and ratio on texts of fitted domains and on others."""
    header = ["Repair", "ΔNLL, fitted", "Ratio", "ΔNLL, other", "Ratio", "Accuracy", "Tokens",
              "Fits"]  # fmt: skip
    lines = []
    for repair in data.repairs:
        line = [look(repair).label]
        for other in (False, True):
            rows = data.on(repair, other=other)
            delta_nll = mean_delta_nll(rows)
            line += [f"{delta_nll.mean:.3f}" if delta_nll else "-", _ratio(data.ratio(rows))]
        by_cell = {row.cell: row for row in data.grid(repair)}
        means = [
            sum(row.accuracies.values()) / len(row.accuracies)
            for row in by_cell.values()
            if row.accuracies
        ]
        fitting = sum(row.peak_bytes <= row.budget_bytes for row in by_cell.values())
        line += [
            percent(sum(means) / len(means) if means else None),
            number(max(row.fit_tokens for row in by_cell.values())), f"{fitting}/{len(by_cell)}",
        ]  # fmt: skip
        lines.append(line)
    return header, lines


def _summary_caption(data: RepairComparison) -> str:
    windows = sum({row.text: len(row.window_losses) for row in data.rows}.values())
    cells, texts = counted(len(data.cells), "cell"), counted(len(data.texts), "text")
    return (
        f"Mean ΔNLL in nats/token over {cells} (a request at a budget) and {texts}. Fitted: "
        "held-out text of the domains that stubs "
        "were fitted on; other: texts of other domains. Ratio: mean ΔNLL divided by that without "
        "stubs; lower is better, 1 means no recovery. Intervals are 95 % percentile bootstrap over "
        f"{windows} windows of report text, resampled jointly for both values of a ratio. Tokens: "
        "tokens that stubs were fitted on. Fits: masks within their budget."
    )


def _grid_table(data: RepairComparison) -> Table:
    """One line per request and budget: ΔNLL of all repairs on each text, and removed blocks."""
    header = ["Request", "Budget", *[_text_label(data, text) for text in data.texts],
              "Blocks removed"]  # fmt: skip
    rows = []
    for cell in data.cells:
        deltas = [
            _chain([_row_delta(data.at(repair, cell, text)) for repair in data.repairs])
            for text in data.texts
        ]
        removed = _chain([_removed(_row_at(data, repair, cell)) for repair in data.repairs])
        rows.append([_request(cell), _budget(data, cell), *deltas, removed])
    return header, rows


def _grid_caption(data: RepairComparison) -> str:
    chain = _chain([look(repair).label for repair in data.repairs])
    own = "; stubs fitted per mask use that of the library" if "per_mask" in data.repairs else ""
    return (
        f"ΔNLL in nats/token; each cell holds: {chain}. Removed blocks (attn+ffn) are in the same "
        "order, given once if equal. Each repair has its own mask, found by greedy search at the "
        f"same budget, stubs included{own}."
    )


def _text_table(data: RepairComparison, text: str) -> Table:
    """ΔNLL with interval and peak memory on one text: a line per request, a column per repair."""
    lines = []
    for cell in data.cells:
        line = [_request(cell), _budget(data, cell)]
        for row in (data.at(repair, cell, text) for repair in data.repairs):
            misses = " (does not fit)" if row and row.peak_bytes > row.budget_bytes else ""
            line.append(f"{row.estimate}, {mebibytes(row.peak_bytes)}{misses}" if row else "")
        lines.append(line)
    return ["Request", "Budget", *[look(repair).label for repair in data.repairs]], lines


def _accuracy_table(data: RepairComparison) -> Table:
    """Mean accuracy of each task over the cells; no rows without tasks."""
    rows = [row for row in data.study("grid") if row.accuracies]
    tasks = sorted({task for row in rows for task in row.accuracies})
    dense = next((row.dense_accuracies for row in rows if row.dense_accuracies), None)
    lines = [["Dense model", *_accuracy_cells([dense], tasks)]] if dense else []
    for repair in data.repairs:
        cells = {row.cell: row.accuracies for row in rows if row.repair == repair}
        if cells:
            lines.append([look(repair).label, *_accuracy_cells(list(cells.values()), tasks)])
    return ["Repair", *tasks, "mean"], lines


def _token_table(data: RepairComparison) -> Table:
    """Ratio to no stubs for each number of fitting tokens and text."""
    rows = [[f"{count:,}", *_ratios(data, own)] for count, own in data.token_rows.items()]
    return ["Fitting tokens", *[_text_label(data, text) for text in data.texts]], rows


def _domain_table(data: RepairComparison) -> Table:
    """Ratio to no stubs: texts fitted on as lines, reported on as columns."""
    cells = {row.cell for row in data.study("domain")}
    lines: dict[tuple[str, int], list[RepairRow]] = {}
    for row in (*data.study("domain"), *data.grid("library"), *data.study("alone")):
        if row.cell in cells:
            own = ", own masks" if row.study == "alone" else ""
            name = ("+" if own else " + ").join(row.fitted_on) + own
            lines.setdefault((name, row.fit_tokens), []).append(row)
    rows = [[name, f"{count:,}", *_ratios(data, own)] for (name, count), own in lines.items()]
    return ["Fitted on", "Tokens", *data.texts], rows


def _orders_table(data: RepairComparison) -> Table:
    """ΔNLL after some removals in GSI order, and the overlap with the order without stubs."""
    plain = next((row for row in data.orders if row.repair == PLAIN), None)
    if plain is None:
        return [], []
    measured = min(len(row.order) for row in data.orders)
    steps = [step for step in _ORDER_STEPS if step <= measured] or [measured]
    shared_of = min(10, measured)
    header = ["GSI order", *[f"{step} removed" for step in steps],
              f"first {shared_of} shared with no stubs", f"attn of first {measured}"]  # fmt: skip
    rows = [
        [
            look(row.repair).label,
            *[f"{row.loss_after[step - 1]:.3f}" for step in steps],
            f"{len(set(plain.order[:shared_of]) & set(row.order[:shared_of]))}",
            f"{sum(block.endswith('.attn') for block in row.order[:measured])}",
        ]
        for row in data.orders
    ]
    return header, rows


def _targets_table(data: RepairComparison) -> Table:
    """Targets with the measured ratios."""
    alone = [row for row in data.study("alone") if row.fitted_on == ["self"]]
    alone = alone or [row for row in data.study("domain") if row.fitted_on == ["self"]]
    by_text = [data.ratio([row for row in alone if row.text == text]) for text in data.texts]
    known = [ratio for ratio in by_text if ratio]
    other_library = data.ratio(data.on("library", other=True))
    distilled = data.ratio(data.on("distilled", other=True))
    fitted_library = data.ratio(data.on("library", other=False))
    worst = max(known, key=lambda ratio: ratio.mean) if known else None
    targets = [
        ("library against plain, texts not fitted on", 0.75, other_library),
        ("distilled, texts not fitted on", 0.6, distilled),
        ("library, held-out text of a fitted domain", 0.6, fitted_library),
        ("fitted on self-written text alone, worst text", 0.8, worst),
    ]
    rows = [
        [
            name,
            _ratio(measured),
            f"at most {target:g}",
            "yes" if measured.mean <= target else "no",
        ]
        for name, target, measured in targets
        if measured
    ]
    return ["Ratio to no stubs", "Measured", "Target", "Met"], rows


def _ratio(ratio: Estimate | None) -> str:
    """A ratio with its interval, or a dash; the reference itself is 1 without an interval."""
    if not ratio:
        return "-"
    if ratio.low == ratio.high == 1:
        return "1"
    return f"{ratio.mean:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"


def _text_label(data: RepairComparison, text: str) -> str:
    """Name of a report text, marked if no stub was fitted on its domain."""
    return f"{text} (not fitted on)" if data.is_other(text) else text


def _accuracy_cells(cells: Sequence[Mapping[str, float]], tasks: Sequence[str]) -> list[str]:
    """Mean accuracy of each task, and over all tasks."""
    means = [sum(cell[task] for cell in cells) / len(cells) for task in tasks]
    return [percent(mean) for mean in [*means, sum(means) / len(means)]]


def _ratios(data: RepairComparison, rows: Sequence[RepairRow]) -> list[str]:
    """Ratio to no stubs on each text."""
    by_text = [[row for row in rows if row.text == text] for text in data.texts]
    return [_ratio(data.ratio(own)) for own in by_text]


def _chain(parts: Sequence[str]) -> str:
    """The common value of all repairs, or else their values in order."""
    return parts[0] if len(set(parts)) == 1 else ARROW.join(parts)


def _request(cell: Cell) -> str:
    return f"{cell[0]} {TIMES} {cell[1]:,}"


def _budget(data: RepairComparison, cell: Cell) -> str:
    size = next(row.budget_bytes for row in data.study("grid") if row.cell == cell)
    return f"{percent(cell[2], 0)} ({mebibytes(size)})"


def _row_delta(row: RepairRow | None) -> str:
    return f"{row.loss:.2f}" if row else "-"


def _row_at(data: RepairComparison, repair: str, cell: Cell) -> RepairRow | None:
    """The row on any text: the mask is the same on all texts."""
    rows = [data.at(repair, cell, text) for text in data.texts]
    return next((row for row in rows if row), None)


def _removed(row: RepairRow | None) -> str:
    if not row:
        return "-"
    attn = sum(name.endswith(".attn") for name in row.mask)
    return f"{attn}+{len(row.mask) - attn}"


def repair_findings(data: RepairComparison) -> list[str]:
    """What each repair recovers, in sentences, also where stubs do not help."""
    texts = []
    for repair in data.repairs:
        clauses = []
        for other, words in ((False, "held-out text of fitted domains"), (True, "other texts")):
            ratio = data.ratio(data.on(repair, other=other))
            if ratio and repair != PLAIN:
                note = "" if ratio.high < 1 else " (no significant gain)"
                clauses.append(f"{_ratio(ratio)} remains on {words}{note}")
        if clauses:
            name = look(repair).label
            remains = " and ".join(clauses)
            texts.append(f"{name}: of the ΔNLL without stubs at equal memory, {remains}.")
    return texts
