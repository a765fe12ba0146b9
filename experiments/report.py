"""``python -m experiments.report``: write tables, figures and one HTML page from records."""

from __future__ import annotations

from pathlib import Path

from experiments.comparison.formatting import counted, look, number, seconds
from experiments.comparison.html import Gallery, write_page
from experiments.comparison.loading import ReportData, gather
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
from experiments.comparison.summaries import Comparison, Summary
from experiments.comparison.tables import tables_markdown, terminal_text
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
        folder: Folder for ``index.html``, ``tables.md``, ``repair_tables.md`` and ``figures/``,
            as far as there are records for them.

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
    """Return the values of the template, and draw all figures."""
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
        import matplotlib  # noqa: F401 - checked before anything is read
    except ImportError:
        raise MissingDependencyError("matplotlib", "The report", "plots") from None


def subtitle(data: ReportData) -> str:
    """Return model, machine, date and commit in a line."""
    parts = []
    if data.profile:
        facts = data.profile["facts"]
        parts.append(f"{facts['name']} ({facts['dtype']}, {facts['num_layers']} layers)")
    elif data.repair_notes:
        parts.append(data.repair_notes[-1]["model"])
    notes = data.evaluations or [run.facts for run in data.runs] or data.repair_notes
    if notes:
        note = notes[-1]
        parts.append(str(note["provenance"]["machine"].get("cpu", "")))
        parts.append(str(note.get("finished", note["starts"][-1]))[:10])
        if note["provenance"]["git"]:
            parts.append(f"commit {note['provenance']['git']['commit'][:8]}")
    return " · ".join(part for part in parts if part)


def abstract(data: ReportData) -> list[str]:
    """Return the introduction of the page."""
    return [
        "A language model in service has a memory budget that changes over time. What uses the "
        "memory changes as well: for short requests it is the weights, most of them in the "
        "feed-forward (FFN) blocks; for many long requests it is the KV cache, which belongs to "
        "the attention blocks. This report compares methods that choose, for each request and "
        "budget, which blocks to remove, so that the model fits at the lowest loss of quality.",
    ]


def key_numbers(data: ReportData) -> list[dict[str, str]]:
    """Return a few numbers for the top of the page."""
    comparison = data.comparison
    if not comparison or not comparison.summaries:
        return []
    found = []
    policy, best, rest = comparison.main_policy, _best_baseline(comparison), _random(comparison)
    if policy:
        found.append(
            _key(f"{policy.delta_nll.mean:.3f}", f"ΔNLL of {look(policy.method).label}, "
                 f"nats/token, 95 % interval {_interval(policy)}")
        )  # fmt: skip
    if best:
        found.append(
            _key(f"{best.delta_nll.mean:.3f}", f"ΔNLL of {look(best.method).label}, the best "
                 f"baseline, {_interval(best)}")
        )  # fmt: skip
    if rest:
        found.append(
            _key(f"{rest.delta_nll.mean:.2f}", f"ΔNLL of random removal, {_interval(rest)}")
        )
    if policy and best:
        found.append(
            _key(f"{seconds(policy.decision_s)}", "decision time of the policy, with "
                 f"{number(policy.evaluations)} model evaluations; {look(best.method).label}: "
                 f"{seconds(best.decision_s)}, {number(best.evaluations)}")
        )  # fmt: skip
    return found


def findings(data: ReportData) -> list[str]:
    """Return the results of the comparison as sentences, for and against the policy."""
    comparison = data.comparison
    policy = comparison.main_policy if comparison else None
    if not comparison or not policy:
        return []
    name = look(policy.method).label
    better: list[str] = []
    worse: list[str] = []
    even: list[str] = []
    for other in comparison.summaries:
        if other.method in comparison.learned or not other.fits_all:
            continue
        difference = comparison.difference(policy.method, other.method)
        place = better if difference.high < 0 else worse if difference.low > 0 else even
        place.append(look(other.method).label)
    clauses = []
    if better:
        clauses.append(f"has a lower ΔNLL than {_join(better)}")
    if even:
        clauses.append(f"does not differ significantly from {_join(even)}")
    if worse:
        clauses.append(f"has a higher ΔNLL than {_join(worse)}")
    missing = [look(s.method).label for s in comparison.summaries if not s.fits_all]
    texts = [
        f"On {counted(len(comparison.cells), 'pair')} of request and budget, {name} "
        f"{_join(clauses)} (paired over held-out windows, 95 % level)."
        if clauses
        else f"There is no baseline to compare {name} with."
    ]
    if missing:
        texts.append(
            f"{_join(missing)} cannot meet every budget, so "
            f"{'their' if len(missing) > 1 else 'its'} ΔNLL is not comparable."
        )
    if policy.delta_nll.seeds == 1:
        texts.append(
            f"{name} was trained with a single seed: the interval covers variation over text, not "
            "over trainings."
        )
    return texts


def _best_baseline(comparison: Comparison) -> Summary | None:
    return next(
        (s for s in comparison.summaries if s.method in comparison.baselines and s.fits_all), None
    )


def _random(comparison: Comparison) -> Summary | None:
    return next((s for s in comparison.summaries if s.method == "random"), None)


def _key(value: str, label: str) -> dict[str, str]:
    return {"value": value, "label": label}


def _interval(summary: Summary) -> str:
    return f"{summary.delta_nll.low:.3f} to {summary.delta_nll.high:.3f}"


def _join(words: list[str]) -> str:
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"


if __name__ == "__main__":
    launch("report", report)
