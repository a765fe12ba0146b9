"""Tables of the page on plans at tight budgets, from the records in ``results/``."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from experiments.comparison.records import ResultRow

PLANS = "tight"
"""The folder of ``results/`` with a comparison of methods that choose plans."""

PLANS_GEMMA = "tight_gemma"
"""The same comparison on Gemma 3 270M."""

OUTSIDE = "tight_outside"
"""The same methods outside the range of requests and budgets that policies were trained for."""

PLAN_COMPARISONS = (PLANS, PLANS_GEMMA, OUTSIDE)
"""All folders whose tables `plan_tables` shortens for the page on plans."""

TRANSFERS = ("tight_transfer_gemma", "tight_transfer_smollm2")
"""Comparisons with policies of the other model."""

HIDDEN = {
    "rap": "kind hidden",
    "rap-nothing_hidden-without=": "nothing hidden",
    "rap-without=_kind_depth_one_shot": "kind, depth and cost hidden",
}
"""What the policies of `TRANSFERS` do not see, by method."""

RANKED = {PLANS: "tight_ranked", PLANS_GEMMA: "tight_ranked_gemma"}
"""Policies that were trained on a packaged score table and rank samples by it, by comparison."""


class Search(NamedTuple):
    """A search that measures plans for one request, beside the methods of a comparison."""

    folder: str
    method: str
    comparison: str


SEARCHES = {
    "tight_greedy": Search("tight_greedy", "greedy_per_byte", PLANS),
    "tight_outside_greedy": Search("tight_outside_greedy", "greedy_per_byte", OUTSIDE),
    "tight_evolutionary": Search("tight_searches", "evolutionary", PLANS),
    "tight_beam": Search("tight_searches", "beam", PLANS),
}
"""Searches by the name of their table."""

PLANS_STUBS = "tight_stubs"
"""The same comparison with stubs."""

STUB_METHODS = ("rap", "uniform", "knapsack")
"""The methods that are also shown without stubs."""


def bold_title(section: str) -> str:
    """A section whose first line is its title, with the title in bold instead of a heading."""
    return f"**{section.strip()}".replace("\n", "**\n", 1)


def plan_tables(text: str, shown: tuple[str, ...] = ("Mean ΔNLL", "ΔNLL divided by")) -> str:
    """Tables over all cells of a comparison of plans, without the page's title.

    Args:
        text: All tables of the comparison.
        shown: How the titles of those begin that follow the summary.
    """
    summary, *sections = text.split("\n## ")
    parts = [bold_title(section) for section in sections if section.startswith(shown)]
    return "\n\n".join([summary.partition("\n")[2].strip(), *parts]) + "\n"


def stubs_markdown(results: Path) -> str:
    """Methods that choose plans with and without stubs, on the same budgets and windows."""
    from experiments.comparison.records import ResultRow
    from experiments.comparison.summaries import Comparison
    from experiments.comparison.tables import tables_markdown

    bare, repaired = (
        ResultRow.read(results / name / "evaluate" / "results.jsonl")
        for name in (PLANS, PLANS_STUBS)
    )
    others = [
        replace(row, method=f"{row.method}-without stubs")
        for row in bare
        if row.method in STUB_METHODS
    ]
    return plan_tables(tables_markdown(Comparison([*repaired, *others])))


def shipped_markdown(results: Path) -> str:
    """ΔNLL of the candidates for the packaged policy, on a third text and on the report text."""
    from experiments.comparison.records import ResultRow
    from experiments.study.statistics import bootstrap_mean

    folder = results / "tight_shipped"
    judged = ResultRow.read(folder / "validation" / "results.jsonl")
    reported = ResultRow.read(results / PLANS / "evaluate" / "results.jsonl")
    reported += [
        replace(row, method="rap-shipped")
        for row in ResultRow.read(folder / "evaluate" / "results.jsonl")
        if row.method == "rap"
    ]
    names = {"frontier": "Frontier table", "rap-shipped": "RAP policy, packaged"}
    rows = []
    for method, seed in dict.fromkeys((row.method, row.seed) for row in judged):
        found = []
        for text in (judged, reported):
            losses = [r.window_losses for r in text if (r.method, r.seed) == (method, seed)]
            found.append(bootstrap_mean(np.mean(losses, axis=0)))
        rows.append((found[0].mean, names.get(method, f"RAP policy, seed {seed}"), *found))
    head = "| Candidate | ΔNLL on stories | ΔNLL on WikiText |\n| :--- | ---: | ---: |\n"
    lines = (f"| {name} | {first} | {second} |" for _, name, first, second in sorted(rows))
    return head + "\n".join(lines) + "\n"


def plan_rows(results: Path, comparison: str = PLANS) -> list[ResultRow]:
    """Rows of all methods of a comparison of plans, and its policies of `RANKED`, if any."""
    from experiments.comparison.records import ResultRow

    rows = ResultRow.read(results / comparison / "evaluate" / "results.jsonl")
    if comparison in RANKED:
        ranked = ResultRow.read(results / RANKED[comparison] / "evaluate" / "results.jsonl")
        rows += [replace(row, method="rap-best of 8") for row in ranked if row.method == "rap"]
    return rows


def transfer_markdown(results: Path, comparison: str) -> str:
    """All tables of one of `TRANSFERS`; its policies are named after what they do not see."""
    from experiments.comparison.summaries import Comparison
    from experiments.comparison.tables import tables_markdown

    rows = [
        replace(row, method=f"rap-{HIDDEN[row.method]}") if row.method in HIDDEN else row
        for row in plan_rows(results, comparison)
    ]
    return tables_markdown(Comparison(rows), comparison)


def ranked_markdown(results: Path, comparison: str = PLANS) -> str:
    """The policies of `RANKED` beside all methods of a comparison of plans."""
    from experiments.comparison.summaries import Comparison
    from experiments.comparison.tables import tables_markdown

    tables = tables_markdown(Comparison(plan_rows(results, comparison)))
    shown = ("ΔNLL of RAP policy best of 8 minus", "ΔNLL divided by that of Uniform")
    return plan_tables(tables, shown)


def search_markdown(results: Path, search: Search) -> str:
    """A search at some requests and budgets, and the methods that were measured there."""
    from experiments.comparison.records import ResultRow
    from experiments.comparison.summaries import Comparison
    from experiments.comparison.tables import ratio_table, tables_markdown
    from experiments.study.looks import look
    from experiments.study.tables import markdown

    rows = ResultRow.read(results / search.folder / "evaluate" / "results.jsonl")
    searched = [row for row in rows if row.method == search.method]
    cells = {row.cell for row in searched}
    others = (row for row in plan_rows(results, search.comparison) if row.cell in cells)
    found = Comparison([*searched, *(row for row in others if row.method != "dense")])
    summary = plan_tables(tables_markdown(found), ())
    title = f"**ΔNLL divided by that of {look(search.method).label}**"
    return f"{summary}\n{title}\n\n{markdown(ratio_table(found, search.method))}\n"


def tasks_markdown(results: Path, name: str = "tight_tasks") -> str:
    """Accuracy of methods that choose plans on lm-eval tasks, by request and budget.

    Args:
        results: The folder of all records.
        name: The folder of these plans; the native model is measured in ``tight_tasks``.
    """
    from experiments.comparison.records import ResultRow
    from experiments.study.looks import look
    from experiments.study.statistics import wilson_interval

    dense = next(
        row
        for row in ResultRow.read(results / "tight_tasks" / "evaluate" / "results.jsonl")
        if row.method == "dense"
    )
    rows = ResultRow.read(results / name / "evaluate" / "results.jsonl")
    tasks = list(rows[0].accuracies)

    def cell(row: ResultRow, task: str) -> str:
        normed = (row.accuracies_norm or {}).get(task)
        plain = f"{100 * row.accuracies[task]:.1f}"
        return plain if normed is None else f"{plain} / {100 * normed:.1f}"

    def mean(row: ResultRow) -> str:
        documents = row.task_documents or {}
        found = {task: row.accuracies[task] for task in tasks}
        spread = sum(a * (1 - a) / documents[task] for task, a in found.items())
        half = 1.96 * spread**0.5 / len(tasks)
        value = sum(found.values()) / len(tasks)
        return f"{100 * value:.1f} ± {100 * half:.1f}"

    names = [f"{t} acc / acc_norm" if t in (rows[0].accuracies_norm or {}) else t for t in tasks]
    lines = [
        f"| Request | Method | ΔNLL, calibration / report | {' | '.join(names)} | mean acc |",
        f"| :--- | :--- | ---: |{' ---: |' * (len(tasks) + 1)}",
    ]
    chosen = [row for row in rows if row.method != "dense"]
    for row in (dense, *sorted(chosen, key=lambda row: (row.target_loss, row.loss_calibration))):
        native = row is dense
        request = "-" if native else "{batch_size} x {seq_len_tokens:,}".format(**row.request)
        label = "Native weights and caches" if native else look(row.method).label
        losses = "0" if native else f"{row.loss_calibration:.2f} / {row.loss:.2f}"
        found = " | ".join(cell(row, task) for task in tasks)
        lines.append(f"| {request} | {label} | {losses} | {found} | {mean(row)} |")
    widest = max(
        high - low
        for row in (dense, *rows)
        for task, accuracy in row.accuracies.items()
        for low, high in [wilson_interval(accuracy, (row.task_documents or {})[task])]
    )
    documents = "/".join(map(str, sorted(set((dense.task_documents or {}).values()))))
    note = (
        f"Percent, of {documents} documents of each task; acc_norm where lm-eval has it. The 95 % "
        f"interval (Wilson) of a single number is at most {50 * widest:.1f} points to each side; "
        "that of the mean is shown."
    )
    return "\n".join(lines) + f"\n\n{note}\n"


def agents_markdown(results: Path) -> str:
    """Agents on the packaged score table, judged on the pinned task's held-out text."""
    from experiments.comparison.records import ResultRow

    folder = results / "tight_agents" / "evaluate" / "SmolLM2-Table-v1-test"
    by_run: dict[str, dict[int | None, list[ResultRow]]] = defaultdict(lambda: defaultdict(list))
    for row in ResultRow.read(folder / "results.jsonl"):
        by_run[row.method][row.seed].append(row)
    lines = []
    for method, seeds in by_run.items():
        test = [float(np.mean([row.loss for row in rows])) for rows in seeds.values()]
        own = [float(np.mean([row.loss_calibration for row in rows])) for rows in seeds.values()]
        every = [row for rows in seeds.values() for row in rows]
        predicted = np.mean([bool(row.provenance.get("predicted")) for row in every])
        spent = np.mean([rows[0].training_s or 0.0 for rows in seeds.values()])
        lines.append(
            (
                float(np.mean(test)),
                f"| `{method}` | {len(seeds)} | {np.mean(test):.3f} | {min(test):.3f} to "
                f"{max(test):.3f} | {np.mean(own):.3f} | {100 * predicted:.0f} % | "
                f"{spent / 60:.1f} min |",
            )
        )
    head = (
        "| Training run | Seeds | ΔNLL on held-out text | Seeds from, to | On calibration text | "
        "Predicted | Training |\n| :--- | ---: | ---: | ---: | ---: | ---: | ---: |\n"
    )
    return head + "\n".join(line for _, line in sorted(lines)) + "\n"
