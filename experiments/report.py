"""``python -m experiments.report``: write tables, figures and one HTML page from records."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from experiments.comparison.loading import ReportData, gather
from experiments.comparison.pairwise import pairwise_comparisons
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
from experiments.comparison.summaries import Summary
from experiments.comparison.tables import tables_markdown, terminal_text
from experiments.config import Config
from experiments.console import say
from experiments.ladder.tables import (
    LADDER_ABSTRACT,
    ladder_findings,
    ladder_markdown,
    ladder_section,
    ladder_tables,
)
from experiments.launch import launch
from experiments.repair.report import (
    REPAIR_ABSTRACT,
    repair_findings,
    repair_key_numbers,
    repair_section,
    repair_terminal_text,
)
from experiments.repair.tables import repair_markdown
from experiments.study.looks import look
from experiments.study.page import Gallery, write_page
from experiments.study.tables import counted, number, seconds, terminal, wrapped
from rap_env.artifacts import atomic_write
from rap_env.errors import MissingDependencyError

ABSTRACT = [
    "A language model in service has a memory budget that changes over time. What uses the "
    "memory changes as well: for short requests it is the weights, most of them in the "
    "feed-forward (FFN) blocks; for many long requests it is the KV cache, which belongs to "
    "the attention blocks. This report compares methods that choose, for each request and "
    "budget, which blocks to remove, so that the model fits at the lowest loss of quality.",
]


LADDER_METHODS_ABSTRACT = [
    "A language model in service has a memory budget that changes over time. This report compares "
    "methods that choose, for each request and budget, the storage format of every item (weights "
    "of a block, KV cache, embeddings), down to its removal, so that the model fits at the lowest "
    "loss of quality.",
]


def report(config: Config, folder: Path) -> Path:
    """Write the report of a comparison.

    The records of ``<runs_dir>/<name>`` are read; the folder gets ``index.html``, ``tables.md``,
    ``repair_tables.md``, ``ladder_tables.md`` and ``figures/``, as far as there are records.

    Returns:
        The page's path.
    """
    _need_matplotlib()
    data = gather(config.root)
    page = folder / "index.html"
    write_page(page, **content(config.report.title, data, folder / "figures"))
    if data.ladder:
        with atomic_write(folder / "ladder_tables.md") as file:
            file.write(ladder_markdown(data.ladder).encode())
        if not data.comparison:
            say(f"\n{terminal(ladder_tables(data.ladder))}\n")
    if data.comparison:
        with atomic_write(folder / "tables.md") as file:
            file.write(tables_markdown(data.comparison).encode())
        say(f"\n{terminal_text(data.comparison)}\n")
        for finding in findings(data):
            say(f"{wrapped(finding)}\n")
    if data.repair:
        with atomic_write(folder / "repair_tables.md") as file:
            file.write(repair_markdown(data.repair, data.repair_orders).encode())
        say(f"\n{repair_terminal_text(data.repair)}\n")
    say(f"The report is {page}")
    return page


def content(title: str, data: ReportData, figures: Path) -> dict[str, object]:
    """Return the values of the template, and draw all figures."""
    gallery = Gallery(figures)
    pruned = data.comparison or data.profile or data.runs
    alone = REPAIR_ABSTRACT if data.repair else LADDER_ABSTRACT
    sections = [
        ladder_section(data.ladder, gallery),
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
        "abstract": _abstract(data) if pruned else alone,
        "key": key_numbers(data) or repair_key_numbers(data),
        "findings": [*ladder_findings(data.ladder), *findings(data), *repair_findings(data)],
        "sections": [section for section in sections if section and section.parts],
    }


def _abstract(data: ReportData) -> list[str]:
    lowers = data.comparison is not None and data.comparison.lowers
    return LADDER_METHODS_ABSTRACT if lowers else ABSTRACT


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


def key_numbers(data: ReportData) -> list[dict[str, str]]:
    """Return a few numbers for the top of the page."""
    comparison = data.comparison
    if not comparison or not comparison.summaries:
        return []
    policy = comparison.main_policy
    fair = [s for s in comparison.summaries if s.method in comparison.baselines and s.fits_all]
    best = fair[0] if fair else None
    found = []
    if policy:
        found.append(_delta_nll(policy, "nats/token, 95 % interval "))
    if best:
        found.append(_delta_nll(best, "the best baseline, "))
    found += [_delta_nll(s, "", 2) for s in comparison.summaries if s.method == "random"]
    if policy and best:
        label = (
            f"decision time of the policy, with {number(policy.evaluations)} model evaluations; "
            f"{look(best.method).label}: {seconds(best.decision_s)}, {number(best.evaluations)}"
        )
        found.append({"value": seconds(policy.decision_s), "label": label})
    return found


def _delta_nll(s: Summary, what: str, digits: int = 3) -> dict[str, str]:
    interval = f"{s.delta_nll.low:.3f} to {s.delta_nll.high:.3f}"
    label = f"ΔNLL of {look(s.method).label}, {what}{interval}"
    return {"value": f"{s.delta_nll.mean:.{digits}f}", "label": label}


def findings(data: ReportData) -> list[str]:
    """Return the results of the comparison as sentences, for and against the policy."""
    comparison = data.comparison
    policy = comparison.main_policy if comparison else None
    if not comparison or not policy:
        return []
    name = look(policy.method).label
    others: dict[str, list[str]] = defaultdict(list)
    for found in pairwise_comparisons(comparison, policy.method):
        if found.other not in comparison.learned and found.other_fits:
            others[found.verdict].append(look(found.other).label)
    words = {"better": "has a lower ΔNLL than", "even": "does not differ significantly from",
             "worse": "has a higher ΔNLL than"}  # fmt: skip
    clauses = [f"{words[v]} {_join(others[v])}" for v in words if others[v]]
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


def _join(words: list[str]) -> str:
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"


if __name__ == "__main__":
    launch("report", report)
