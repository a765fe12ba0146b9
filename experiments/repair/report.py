"""The report's part on stubs: sentences, the section, and what the terminal shows."""

from __future__ import annotations

import textwrap
from functools import partial

from experiments.comparison.formatting import TERMINAL_COLUMNS, TIMES, look, percent, plain
from experiments.comparison.html import Gallery, Section
from experiments.comparison.loading import ReportData
from experiments.repair import figures as repair_figures
from experiments.repair import tables as repair_tables
from experiments.repair.orders import ORDERS_CAPTION, orders_table
from experiments.repair.summaries import PLAIN, RepairComparison
from experiments.repair.tables import repair_ratio

REPAIR_ABSTRACT = [
    "A model that must fit a memory budget can leave out attention and feed-forward (FFN) blocks. "
    "A stub is what may stand in a removed block's place: a low-rank linear map and a mean, small "
    "beside the block, fitted once for any set of removed blocks. This report shows how much of "
    "the lost quality stubs win back, at equal memory: their own bytes are counted.",
]

_KINDS = {False: "held-out text of fitted domains", True: "texts of other kinds"}


def repair_key_numbers(data: ReportData) -> list[dict[str, str]]:
    """What the libraries leave of the loss without stubs, for the top of a page on stubs alone."""
    found = data.repair
    if not found:
        return []
    numbers = []
    for repair in (name for name in found.repairs if name in ("library", "distilled")):
        for other, words in _KINDS.items():
            ratio = found.ratio_of(repair, other=other)
            if ratio:
                label = (
                    f"of the loss without stubs is left on {words}: {look(repair).label}, 95 % "
                    f"interval {percent(ratio.low, 0)} to {percent(ratio.high, 0)}"
                )
                numbers.append({"value": percent(ratio.mean, 0), "label": label})
    return numbers


def repair_findings(data: ReportData) -> list[str]:
    """What stubs win back, in words, for and against them."""
    found = data.repair
    if not found:
        return []
    return [text for repair in found.repairs if (text := _finding(found, repair))]


def repair_section(data: ReportData, gallery: Gallery) -> Section:
    """What stubs win back at equal memory, what fitting tokens are worth, and which text."""
    section = Section("repair", "Repair")
    found = data.repair
    if not found:
        return section
    if found.summaries:
        section.text(repair_tables.summary_caption(found))
        section.table(repair_tables.repair_summary_table(found), _names(found))
    goals = repair_tables.goals_table(found)
    if goals:
        section.table(goals, title="Goals")
    if found.cells:
        _add_grid(section, gallery, found)
    _add_studies(section, gallery, found)
    orders = orders_table(data.repair_orders)
    if orders:
        section.table(orders, _names(found), title="The order of importance, with stubs in place")
        section.text(ORDERS_CAPTION)
    return section


def _add_grid(section: Section, gallery: Gallery, found: RepairComparison) -> None:
    gallery.add(
        section, "repair_loss_against_peak", "Loss against peak memory, with and without stubs",
        f"Peak memory of each mask under its request (batch {TIMES} tokens), stubs included. A "
        "line joins the budgets of one request; hollow marks miss their budget; intervals stand in "
        f"the tables. {_looks_words(found)}",
        partial(repair_figures.loss_against_peak, found),
    )  # fmt: skip
    section.table(repair_tables.repair_grid_table(found), title="Loss at each request and budget")
    section.text(repair_tables.grid_caption(found))
    for text in found.texts:
        title = f"Loss with interval and peak memory, {repair_tables.text_label(found, text)}"
        section.table(repair_tables.repair_text_table(found, text), title=title, folded=True)
    accuracy = repair_tables.repair_accuracy_table(found)
    if accuracy:
        section.table(accuracy, _names(found), title="Accuracy of each task, mean over the cells")


def _add_studies(section: Section, gallery: Gallery, found: RepairComparison) -> None:
    tokens, domains = repair_tables.token_table(found), repair_tables.domain_table(found)
    if tokens:
        gallery.add(
            section, "repair_ratio_against_tokens", "What fitting tokens are worth",
            "Loss as a share of that without stubs; the dotted line is no stubs. Solid lines are "
            "texts of fitted domains, dashed ones others. Intervals are 95 % percentile bootstrap "
            f"over windows. {repair_tables.SAME_MASKS}",
            partial(repair_figures.ratio_against_tokens, found),
        )  # fmt: skip
        section.table(tokens, title="Ratio to no stubs against fitting tokens")
    if domains:
        title = "Ratio to no stubs: fitted on (lines), reported on (columns)"
        section.table(domains, title=title)
        section.text(repair_tables.SAME_MASKS)


def repair_terminal_text(found: RepairComparison) -> str:
    """Summary and goals for the terminal, at most 100 columns wide, with a legend."""
    parts = []
    if found.summaries:
        header, rows = repair_tables.repair_summary_table(found)
        parts.append(plain(([name.removeprefix("Loss, ") for name in header], rows)))
        parts.append(textwrap.fill(repair_tables.summary_caption(found), TERMINAL_COLUMNS))
    goals = repair_tables.goals_table(found)
    if goals:
        parts.append(plain(goals))
    return "\n\n".join(parts)


def _finding(found: RepairComparison, repair: str) -> str:
    """What one repair leaves of the loss, and whether its interval lies below that of no stubs."""
    clauses = []
    for other, words in _KINDS.items():
        ratio = found.ratio_of(repair, other=other)
        if ratio and repair != PLAIN:
            doubt = "" if ratio.high < 1 else " (no clear gain)"
            clauses.append(f"{repair_ratio(ratio)} is left on {words}{doubt}")
    if not clauses:
        return ""
    return (
        f"{look(repair).label}: of the loss without stubs at equal memory, {' and '.join(clauses)}."
    )


def _looks_words(found: RepairComparison) -> str:
    return "; ".join(f"{look(repair).label}: {look(repair).what}" for repair in found.repairs) + "."


def _names(found: RepairComparison) -> dict[str, str]:
    """First cells of tables -> repairs, for their colours."""
    return {look(repair).label: repair for repair in found.repairs}
