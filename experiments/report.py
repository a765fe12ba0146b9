"""``python -m experiments.report``: write tables, figures and one HTML page from records."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

from experiments import live
from experiments.comparison import result_figures, result_tables
from experiments.comparison.run_records import Records, gather, learning_table
from experiments.comparison.summaries import Comparison, pairwise_comparisons
from experiments.config import Config
from experiments.explorer import PAGE as EXPLORER
from experiments.launch import launch
from experiments.study.console import MissingGroupError, say
from experiments.study.json_records import write_text
from experiments.study.plotting import Draw, look, save_png, short_label, svg_uri
from experiments.study.table_format import (
    TIMES,
    mebibytes,
    percent,
    relative_words,
    seconds,
    shape_words,
    text_words,
    wrapped,
)
from rap_env.errors import counted
from rap_env.extras import require_extra

TEMPLATE = Path(__file__).parent / "comparison" / "report.html.j2"


def report(config: Config, folder: Path) -> Path:
    """Write the report of a comparison.

    The records of ``<runs_dir>/<name>`` are read; the folder gets ``index.html``, the
    explorer of plans, ``tables.md`` and ``figures/``, as far as there are records.

    Returns:
        The page's path.
    """
    require_extra("plots", "The report")  # before anything is read
    data = gather(config.root)
    page = folder / "index.html"
    write_page(page, **content(config.report["title"], data, folder / "figures"))
    if data.comparison:
        write_text(folder / "tables.md", result_tables.tables_markdown(data.comparison))
        if data.comparison.has_levels:
            write_text(folder / EXPLORER.name, EXPLORER.read_text(encoding="utf-8"))
        say(f"\n{result_tables.terminal_text(data.comparison)}\n")
        for finding in findings(data):
            say(f"{wrapped(finding)}\n")
    say(f"The report is {page}")
    return page


def write_page(path: Path, **content: Any) -> None:
    """Render the template to a file, without external resources.

    Raises:
        MissingGroupError: jinja2 is not installed.
        StorageFullError: The disk is full.
    """
    try:
        import jinja2
    except ImportError:
        raise MissingGroupError("jinja2", "The report", "agents") from None
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    write_text(path, template.render(**content))


def content(title: str, data: Records, folder: Path) -> dict[str, Any]:
    """Return the values of the template, which draws the figures in the order of the page."""
    comparison = data.comparison
    compared = comparison if comparison and comparison.summaries else None
    chosen = _chosen(comparison, data.profile) if comparison else {}
    draw: dict[str, Draw] = {f"levels_{m}": picture for m, picture in chosen.items()}
    if compared and len(compared.cells) > len(compared.shapes):  # else its lines are points
        draw["loss_against_budget"] = partial(result_figures.delta_nll_against_budget, compared)
    if data.profile:
        draw["memory"] = partial(result_figures.memory_picture, data.profile["memory_shares"])
    if result_figures.logged_curves(data.runs):
        draw["learning_curves"] = partial(result_figures.learning_curves, data.runs)
    recording = live.recorded(data.root / "live")
    methods = {run.method for run in data.runs}
    names = result_tables.method_names(comparison) if comparison else {}
    by_name = {name: look(method) for name, method in names.items()}
    if recording:
        draw["live"] = partial(live.live_figure, recording)

    def image(name: str) -> str:
        figure = draw[name]()
        save_png(figure, folder / f"{name}.png")
        return svg_uri(figure)

    return {
        "title": title,
        "subtitle": subtitle(data),
        "findings": findings(data),
        "draw": draw,
        "image": image,
        "chosen": {f"levels_{method}": look(method).label for method in chosen},
        "compared": compared,
        "recording": recording,
        "explorer": EXPLORER.name if compared and compared.has_levels else None,
        "profile": data.profile,
        "smoothed": result_figures.SMOOTHED_EPISODES,
        "trainings": learning_table(data.runs),
        "looks": {short_label(method): look(method) for method in methods} | by_name,
        "depends": comparison.rows[0].depends_on if comparison else {},
        "notes": data.notes[-1:],
        "seconds": seconds,
        "text_words": text_words,
        "times": TIMES,
        **(_compared(compared) if compared else {}),
    }


def _compared(comparison: Comparison) -> dict[str, Any]:
    """Return the values of the template about a comparison."""
    return {
        "shapes": ", ".join(map(shape_words, comparison.shapes)),
        "budgets": result_tables.budget_words(comparison),
        "pairs": counted(len(comparison.cells), "pair"),
        "accuracies": any(row.accuracies for row in comparison.rows),
        "tables": result_tables.comparison_document(comparison),
        "costs": result_tables.costs_table(comparison),
    }


def _chosen(comparison: Comparison, profile: dict[str, Any] | None) -> dict[str, Draw]:
    """Return the pictures of the levels that methods choose for a short and a long request.

    They are those of the trained methods and the greedy search, or of the first method.
    """
    shapes = {comparison.shapes[0], comparison.shapes[-1]}
    shown = comparison.learned + [m for m in comparison.methods if m == "greedy_per_byte"]
    num_layers = profile["facts"]["num_layers"] if profile else comparison.num_layers
    pictures: dict[str, Draw] = {}
    for method in shown or comparison.compared[:1]:
        rows = [row for row in comparison.rows if row.method == method and row.shape in shapes]
        rows = [row for row in rows if row.seed == rows[0].seed]
        rows.sort(key=lambda row: (row.shape[0] * row.shape[1], -row.budget_bytes))
        lines = [
            result_figures.LevelsLine(
                row.shape,
                f"{shape_words(row.shape)}  {mebibytes(row.budget_bytes)} "
                f"({percent(row.budget_fraction, 0)}"
                f"{'' if row.target_delta_nll is None else f', ~{row.target_delta_nll:g}'})",
                row.plan.levels,
            )
            for row in rows
        ]
        if lines:
            pictures[method] = partial(result_figures.levels_picture, lines, num_layers)
    return pictures


def subtitle(data: Records) -> str:
    """Return model, machine, date and commit in a line."""
    parts = []
    if data.profile:
        facts = data.profile["facts"]
        parts.append(f"{facts['name']} ({facts['dtype']}, {facts['num_layers']} layers)")
    notes = data.notes or [run.facts for run in data.runs]
    if notes:
        note = notes[-1]
        parts.append(str(note["provenance"]["machine"].get("cpu", "")))
        parts.append(str(note.get("finished", note["starts"][-1]))[:10])
        if note["provenance"]["git"]:
            parts.append(f"commit {note['provenance']['git']['commit'][:8]}")
    return " · ".join(part for part in parts if part)


def findings(data: Records) -> list[str]:
    """Return the results of the comparison as sentences, for and against the policy."""
    comparison = data.comparison
    policy = comparison.main_policy if comparison else None
    if not comparison or not policy:
        return []
    name = look(policy.method).label
    others: dict[str, list[str]] = defaultdict(list)
    for pair in pairwise_comparisons(comparison, policy.method):
        if pair.other not in comparison.learned and pair.other_fits:
            relative = "" if pair.relative is None else f" ({relative_words(pair.relative)})"
            others[pair.verdict].append(f"{look(pair.other).label}{relative}")
    words = {"better": "loses less than", "even": "does not differ significantly from",
             "worse": "loses more than"}  # fmt: skip
    clauses = [f"{words[v]} {_join(others[v])}" for v in words if others[v]]
    missing = [look(s.method).label for s in comparison.summaries if not s.fits_all]
    texts = [
        f"On {counted(len(comparison.cells), 'pair')} of request and budget, {name} "
        f"{_join(clauses)}. Percentages are differences in ΔNLL, with 95 % intervals paired over "
        f"{counted(len(comparison.rows[0].window_delta_nll), 'window')} of held-out text."
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
