"""Tables of the page on plans at tight budgets, from the records in ``results/``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

PLANS = "tight"
"""The folder of ``results/`` with a comparison of methods that choose plans."""

PLANS_GEMMA = "tight_gemma"
"""The same comparison on Gemma 3 270M."""

PLAN_COMPARISONS = (
    PLANS,
    PLANS_GEMMA,
    "tight_outside",
    "tight_transfer_gemma",
    "tight_transfer_smollm2",
)
"""All folders whose tables `plan_tables` shortens for the page on plans."""

PLANS_STUBS = "tight_stubs"
"""The same comparison with stubs."""

STUB_METHODS = ("rap", "uniform", "knapsack")
"""The methods that are also shown without stubs."""


def plan_tables(text: str) -> str:
    """The tables over all cells of a comparison of plans, without the page's title."""
    summary, *sections = text.split("\n## ")
    shown = ("Mean ΔNLL", "ΔNLL divided by", "Targets")
    parts = [f"## {section.strip()}" for section in sections if section.startswith(shown)]
    return "\n\n".join([summary.partition("\n")[2].strip(), *parts]) + "\n"


def stubs_markdown(results: Path) -> str:
    """Methods that choose plans with and without stubs, on the same budgets and windows."""
    from experiments.comparison.records import read_rows
    from experiments.comparison.summaries import Comparison
    from experiments.comparison.tables import tables_markdown

    bare, repaired = (
        read_rows(results / name / "evaluate" / "results.jsonl") for name in (PLANS, PLANS_STUBS)
    )
    others = [
        replace(row, method=f"{row.method}-without stubs")
        for row in bare
        if row.method in STUB_METHODS
    ]
    return plan_tables(tables_markdown(Comparison([*repaired, *others])))


def shipped_markdown(results: Path) -> str:
    """ΔNLL of the candidates for the packaged policy, on a third text and on the report text."""
    from experiments.comparison.records import read_rows
    from experiments.comparison.statistics import bootstrap_mean

    folder = results / "tight_shipped"
    judged = read_rows(folder / "validation" / "results.jsonl")
    reported = read_rows(results / PLANS / "evaluate" / "results.jsonl")
    reported += [
        replace(row, method="rap-shipped")
        for row in read_rows(folder / "evaluate" / "results.jsonl")
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
