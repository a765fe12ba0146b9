"""The section on stubs of a report: abstract, key numbers, findings, tables, terminal text."""

from __future__ import annotations

from functools import partial

from experiments.comparison.loading import ReportData
from experiments.repair import figures as repair_figures
from experiments.repair import tables as repair_tables
from experiments.repair.summaries import PLAIN, RepairComparison
from experiments.repair.tables import repair_ratio
from experiments.study.looks import look
from experiments.study.page import Gallery, Section
from experiments.study.tables import TIMES, percent, plain, wrapped

REPAIR_ABSTRACT = [
    "A model can fit a memory budget by removing attention and feed-forward (FFN) blocks. A stub "
    "is a small module in a removed block's place: a low-rank linear map and a mean, fitted once "
    "for any set of removed blocks. This report shows how much of the lost quality stubs recover "
    "at equal memory, with the bytes of the stubs counted.",
]

_KINDS = {False: "held-out text of fitted domains", True: "texts of other domains"}


def repair_key_numbers(data: ReportData) -> list[dict[str, str]]:
    """Key numbers of a page on stubs alone: ratios of the libraries to no stubs."""
    found = data.repair
    if not found:
        return []
    numbers = []
    for repair in (name for name in found.repairs if name in ("library", "distilled")):
        for other, words in _KINDS.items():
            ratio = found.ratio_of(repair, other=other)
            if ratio:
                label = (
                    f"of the ΔNLL without stubs remains on {words}: {look(repair).label}, 95 % "
                    f"interval {percent(ratio.low, 0)} to {percent(ratio.high, 0)}"
                )
                numbers.append({"value": percent(ratio.mean, 0), "label": label})
    return numbers


def repair_findings(data: ReportData) -> list[str]:
    """Findings in sentences, also where stubs do not help."""
    found = data.repair
    if not found:
        return []
    return [text for repair in found.repairs if (text := _finding(found, repair))]


def repair_section(data: ReportData, gallery: Gallery) -> Section:
    """Section on repair: ΔNLL at equal memory, and the effect of fitting tokens and texts."""
    section = Section("repair", "Repair")
    found = data.repair
    if not found:
        return section
    names = {look(repair).label: repair for repair in found.repairs}
    for part in repair_tables.repair_document(found, data.repair_orders):
        if part.name == "grid":
            _add_peaks(section, gallery, found)
        if part.name == "tokens":
            _add_tokens(section, gallery, found)
        section.document([part], names)
    return section


def _add_peaks(section: Section, gallery: Gallery, found: RepairComparison) -> None:
    looks = "; ".join(f"{look(repair).label}: {look(repair).what}" for repair in found.repairs)
    gallery.add(
        section, "repair_delta_nll_against_peak",
        "ΔNLL against peak memory, with and without stubs",
        f"Peak memory of each mask for its request (batch {TIMES} tokens), stubs included. A line "
        "joins the budgets of one request; hollow marks exceed their budget; the tables have "
        f"intervals. {looks}.",
        partial(repair_figures.delta_nll_against_peak, found),
    )  # fmt: skip


def _add_tokens(section: Section, gallery: Gallery, found: RepairComparison) -> None:
    gallery.add(
        section, "repair_ratio_against_tokens", "Effect of the number of fitting tokens",
        "ΔNLL as a share of that without stubs (dotted line). Solid lines are texts of fitted "
        "domains, dashed lines others. Intervals are 95 % percentile bootstrap over windows. "
        f"{repair_tables.SAME_MASKS}",
        partial(repair_figures.ratio_against_tokens, found),
    )  # fmt: skip


def repair_terminal_text(found: RepairComparison) -> str:
    """Summary and targets for the terminal, at most 100 columns wide, with a legend."""
    parts = []
    if found.summaries:
        header, rows = repair_tables.repair_summary_table(found)
        parts.append(plain(([name.removeprefix("ΔNLL, ") for name in header], rows)))
        parts.append(wrapped(repair_tables.summary_caption(found)))
    targets = repair_tables.targets_table(found)
    if targets:
        parts.append(plain(targets))
    return "\n\n".join(parts)


def _finding(found: RepairComparison, repair: str) -> str:
    """One sentence on a repair: its ratios to no stubs; empty for no stubs itself."""
    clauses = []
    for other, words in _KINDS.items():
        ratio = found.ratio_of(repair, other=other)
        if ratio and repair != PLAIN:
            note = "" if ratio.high < 1 else " (no significant gain)"
            clauses.append(f"{repair_ratio(ratio)} remains on {words}{note}")
    if not clauses:
        return ""
    return (
        f"{look(repair).label}: of the ΔNLL without stubs at equal memory, {' and '.join(clauses)}."
    )
