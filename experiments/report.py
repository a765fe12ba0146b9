"""``python -m experiments.report``: tables, figures and one HTML page, from records alone."""

from __future__ import annotations

from pathlib import Path

from experiments.comparison.html import Gallery, write_page
from experiments.comparison.pairwise_tables import tables_markdown
from experiments.comparison.report_data import ReportData, gather
from experiments.comparison.sections import (
    comparison_section,
    costs_section,
    importance_section,
    learning_section,
    memory_section,
    method_section,
    policy_section,
    provenance_section,
)
from experiments.comparison.sentences import abstract, findings, key_numbers, subtitle
from experiments.comparison.tables import terminal_text
from experiments.config import Config
from experiments.console import say
from experiments.launch import launch
from experiments.repair.report import (
    REPAIR_ABSTRACT,
    repair_findings,
    repair_key_numbers,
    repair_section,
    repair_terminal_text,
)
from experiments.repair.tables import repair_markdown
from rap_env.artifacts import atomic_write
from rap_env.errors import MissingDependencyError


def report(config: Config, folder: Path) -> Path:
    """Write the report of a comparison.

    Args:
        config: All settings; the records of ``<runs_dir>/<name>`` are read.
        folder: Where ``index.html``, ``tables.md``, ``repair_tables.md`` and ``figures/`` go, as
            far as there are records for them.

    Returns:
        The page's path.

    Raises:
        ExperimentError: There are no records.
        ArtifactError: A record is damaged.
        MissingDependencyError: matplotlib or jinja2 is not installed.
    """
    _need_matplotlib()
    data = gather(config.root)
    page = folder / "index.html"
    write_page(page, **content(config.report.title, data, folder / "figures"))
    if data.comparison:
        with atomic_write(folder / "tables.md") as file:
            file.write(tables_markdown(data.comparison).encode())
        say(f"\n{terminal_text(data.comparison)}\n")
    if data.repair:
        with atomic_write(folder / "repair_tables.md") as file:
            file.write(repair_markdown(data.repair, data.repair_orders).encode())
        say(f"\n{repair_terminal_text(data.repair)}\n")
    say(f"The report is {page}")
    return page


def content(title: str, data: ReportData, figures: Path) -> dict[str, object]:
    """Everything that the template needs; figures are drawn on the way."""
    gallery = Gallery(figures)
    sections = [
        comparison_section(data, gallery),
        policy_section(data, gallery),
        memory_section(data, gallery),
        importance_section(data, gallery),
        learning_section(data, gallery),
        repair_section(data, gallery),
        costs_section(data),
        method_section(data),
        provenance_section(data),
    ]
    return {
        "title": title,
        "subtitle": subtitle(data),
        "abstract": REPAIR_ABSTRACT if _repair_alone(data) else abstract(data),
        "key": key_numbers(data) or repair_key_numbers(data),
        "findings": [*findings(data), *repair_findings(data)],
        "sections": [section for section in sections if section and section.parts],
    }


def _repair_alone(data: ReportData) -> bool:
    return bool(data.repair) and not (data.comparison or data.profile or data.runs)


def _need_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401 - asked for before anything is read
    except ImportError:
        raise MissingDependencyError("matplotlib", "The report", "plots") from None


if __name__ == "__main__":
    launch("report", report)
