"""Tables of the documentation that are not those of one study, made from ``results/``."""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
sys.path[:0] = [str(ROOT)]

from experiments.compare import compare  # noqa: E402 - the path comes first
from experiments.comparison.result_rows import ResultRow  # noqa: E402
from experiments.comparison.result_tables import (  # noqa: E402
    quality_columns,
    quality_entry,
    ratio_table,
    tables_markdown,
)
from experiments.comparison.summaries import Comparison  # noqa: E402
from experiments.config.program_settings import CompareConfig  # noqa: E402
from experiments.study.plotting import look  # noqa: E402
from experiments.study.statistics import bootstrap_mean, wilson_interval  # noqa: E402
from experiments.study.table_format import (  # noqa: E402
    columns_table,
    markdown,
    seconds,
)
from rap_env.leaderboard.entries import predicted_test_delta_nll, published_entries  # noqa: E402
from rap_env.leaderboard.tasks import pinned_task, pinned_tasks, tasks_of  # noqa: E402
from rap_env.scoring.held_out import spearman  # noqa: E402

PLANS, GEMMA, OUTSIDE, LOW_BITS, OWN_BUDGETS, LOW_BITS_GEMMA = (
    "tight", "tight_gemma", "tight_outside", "low_bits", "tight_low_bits",
    "low_bits_gemma",
)  # fmt: skip
"""Comparisons of methods that choose plans."""

_MOST_INTERVALS = 8  # columns of a table in which each number has its interval

HIDDEN = {
    "rap": "kind hidden",
    "rap-nothing_hidden-without=": "nothing hidden",
    "rap-without=_kind_depth_one_shot": "kind, depth and cost hidden",
}
"""What the policies of another model do not see, by method."""

RANKED = {PLANS: "tight_ranked", GEMMA: "tight_ranked_gemma"}
"""Policies that were trained on a packaged score table and rank samples by it, by comparison."""

SEARCHES = {
    "tight_greedy": ("tight_greedy", "greedy_per_byte", PLANS),
    "tight_outside_greedy": ("tight_outside_greedy", "greedy_per_byte", OUTSIDE),
    "tight_evolutionary": ("tight_searches", "evolutionary", PLANS),
    "tight_beam": ("tight_searches", "beam", PLANS),
}
"""Searches for one request: their folder and method, and the comparison they are set beside."""


def read(name: str, part: str = "evaluate") -> list[ResultRow]:
    """The rows of an evaluation."""
    return ResultRow.read(RESULTS / name / part / ResultRow.file)


def comparison_text(name: str) -> str:
    """All tables of one comparison, as ``python -m experiments.compare`` prints them."""
    return compare(CompareConfig(runs=str(RESULTS / name), format="markdown"))


def shown_tables(
    text: str, titles: tuple[str, ...] = ("Mean ΔNLL", "ΔNLL divided by that of Uniform")
) -> str:
    """The summary of a comparison, and those tables whose titles begin in one of some ways."""
    summary, *sections = text.split("\n## ")
    shown = [section for section in sections if section.startswith(titles)]
    bold = [f"**{section.strip()}".replace("\n", "**\n", 1) for section in shown]
    return "\n\n".join([summary.partition("\n")[2].strip(), *map(narrowed, bold)]) + "\n"


def narrowed(text: str) -> str:
    """Tables of many columns without the intervals of all but the last one, which fit no page."""
    if text.count("|", 0, text.find("\n", text.find("|"))) <= _MOST_INTERVALS:
        return text
    return re.sub(r" \[[^]|]*\](?= \|.)", "", text)


def first_tables(text: str) -> str:
    """The summary and the first table of verdicts of a comparison."""
    verdicts = [title.partition("\n")[0] for title in text.split("\n## ")[1:2]]
    titles = tuple(title for title in verdicts if " minus each other method" in title)
    return shown_tables(text, titles)


def plan_rows(comparison: str = PLANS) -> list[ResultRow]:
    """Rows of all methods of a comparison of plans, and its policies of `RANKED`, if any."""
    rows = read(comparison)
    if comparison in RANKED:
        ranked = [row for row in read(RANKED[comparison]) if row.method == "rap"]
        rows += [replace(row, method="rap-best of 8") for row in ranked]
    return rows


def transfer_text(comparison: str) -> str:
    """All tables of policies of the other model, named after what they do not see."""
    rows = [
        replace(row, method=f"rap-{HIDDEN[row.method]}") if row.method in HIDDEN else row
        for row in plan_rows(comparison)
    ]
    return tables_markdown(Comparison(rows), comparison)


def ranked_text(comparison: str) -> str:
    """The policies of `RANKED` beside all methods of a comparison of plans."""
    titles = ("ΔNLL of RAP policy best of 8 minus", "ΔNLL divided by that of Uniform")
    return shown_tables(tables_markdown(Comparison(plan_rows(comparison))), titles)


def search_text(folder: str, method: str, comparison: str) -> str:
    """A search at some requests and budgets, and the methods that were measured there."""
    searched = [row for row in read(folder) if row.method == method]
    cells = {row.cell for row in searched}
    others = [r for r in plan_rows(comparison) if r.cell in cells and r.method != "dense"]
    compared = Comparison([*searched, *others])
    title = f"**ΔNLL divided by that of {look(method).label}**"
    table = narrowed(markdown(ratio_table(compared, method)))
    return f"{shown_tables(tables_markdown(compared), ())}\n{title}\n\n{table}\n"


def packaged_text() -> str:
    """ΔNLL of the candidates for the packaged policy, on a third text and on the report text."""
    judged, reported = read("tight_packaged", "validation"), read(PLANS)
    packaged = [row for row in read("tight_packaged") if row.method == "rap"]
    reported += [replace(row, method="rap-packaged") for row in packaged]
    names = {"frontier": "Frontier table", "rap-packaged": "RAP policy, packaged"}
    lines = []
    for method, seed in dict.fromkeys((row.method, row.seed) for row in judged):
        estimates = []
        for text in (judged, reported):
            losses = [r.window_delta_nll for r in text if (r.method, r.seed) == (method, seed)]
            estimates.append(bootstrap_mean(np.mean(losses, axis=0)))
        name = names.get(method, f"RAP policy, seed {seed}")
        lines.append((estimates[0].mean, [name, *map(str, estimates)]))
    header = ["Candidate", "ΔNLL on stories", "ΔNLL on WikiText"]
    return markdown((header, [cells for _, cells in sorted(lines)]))


def tasks_text(name: str = "tight_tasks") -> str:
    """Accuracy of methods that choose plans on lm-eval tasks, by request and budget.

    Args:
        name: The folder of these plans; the native model is measured there or in ``tight_tasks``.
    """
    dense = next(row for row in [*read(name), *read("tight_tasks")] if row.method == "dense")
    chosen = [row for row in read(name) if row.method != "dense"]
    tasks, normed = list(chosen[0].accuracies), chosen[0].accuracies_norm or {}
    chosen.sort(key=lambda row: (row.target_delta_nll, row.calibration_delta_nll))
    rows = [dense, *chosen]
    columns = quality_columns(row.quality for row in chosen)

    def accuracy(row: ResultRow, task: str) -> str:
        second = (row.accuracies_norm or {}).get(task)
        plain = f"{100 * row.accuracies[task]:.1f}"
        return plain if second is None else f"{plain} / {100 * second:.1f}"

    def mean(row: ResultRow) -> str:
        documents, shares = row.task_documents or {}, {t: row.accuracies[t] for t in tasks}
        spread = sum(a * (1 - a) / documents[task] for task, a in shares.items())
        half = 1.96 * spread**0.5 / len(tasks)
        return f"{100 * sum(shares.values()) / len(tasks):.1f} ± {100 * half:.1f}"

    lines = []
    for row in rows:
        losses = f"{row.calibration_delta_nll:.2f} / {row.delta_nll:.2f}"
        named = ["{batch_size} x {seq_len_tokens:,}".format(**row.request),
                 look(row.method).label, losses]  # fmt: skip
        if row is dense:
            named = ["-", "Native weights and caches", "0"]
        distances = (quality_entry(row.quality, name) for name in columns.values())
        lines.append([*named, *(accuracy(row, task) for task in tasks), mean(row), *distances])
    header = ["Request", "Method", "ΔNLL, calibration / report",
              *(f"{task} acc / acc_norm" if task in normed else task for task in tasks),
              "mean acc", *columns]  # fmt: skip
    widest = max(
        high - low
        for row in rows
        for task, share in row.accuracies.items()
        for low, high in [wilson_interval(share, (row.task_documents or {})[task])]
    )
    documents = "/".join(map(str, sorted(set((dense.task_documents or {}).values()))))
    return (
        f"{markdown((header, lines))}\nPercent, of {documents} documents of each task; acc_norm "
        "where lm-eval has it. The 95 % interval (Wilson) of a single number is at most "
        f"{50 * widest:.1f} points to each side; that of the mean is shown.\n"
    )


def agents_text() -> str:
    """Agents on the packaged score table, judged on the pinned task's held-out text."""
    runs: dict[str, dict[int | None, list[ResultRow]]] = defaultdict(lambda: defaultdict(list))
    for row in read("tight_agents", "evaluate/SmolLM2-Table-v1-test"):
        runs[row.method][row.seed].append(row)
    lines, scores = [], pinned_task("RAPLadder/SmolLM2-Table-v1").scores
    for method, seeds in runs.items():
        runs_of = [(rows, [row.fits for row in rows]) for rows in seeds.values()]
        test = [float(scores([r.delta_nll for r in rows], fits).mean()) for rows, fits in runs_of]
        own = [
            float(scores([r.calibration_delta_nll for r in rows], fits).mean())
            for rows, fits in runs_of
        ]
        every = [row for rows in seeds.values() for row in rows]
        predicted = np.mean([bool(row.provenance.get("predicted")) for row in every])
        spent = np.mean([rows[0].training_s or 0.0 for rows in seeds.values()])
        cells = [f"`{method}`", str(len(seeds)), f"{np.mean(test):.3f}",
                 f"{min(test):.3f} to {max(test):.3f}", f"{np.mean(own):.3f}",
                 f"{100 * predicted:.0f} %", f"{spent / 60:.1f} min"]  # fmt: skip
        lines.append((float(np.mean(test)), cells))
    header = ["Training run", "Seeds", "ΔNLL on held-out text", "Seeds from, to",
              "On calibration text", "Predicted", "Training"]  # fmt: skip
    return markdown((header, [cells for _, cells in sorted(lines)]))


def ablation_text() -> str:
    """The objective of each ablation: mean ΔNLL of the policy alone on the calibration text."""
    runs = sorted((RESULTS / "ablation" / "train").glob("*/run.json"))
    values = sorted((float(json.loads(path.read_text())["objective"]), path) for path in runs)
    lines = [[f"`{path.parent.name}`", f"{value:.3f}"] for value, path in values]
    return markdown((["Training run", "ΔNLL on calibration text"], lines))


def leaderboard_text() -> str:
    """The published entries of each comparison, the best on held-out text first."""
    parts = []
    for comparison in dict.fromkeys(task.comparison for task in pinned_tasks().values()):
        names = [f"`{task.name}`" for task in tasks_of(comparison)]
        entries = published_entries(comparison)
        entries = sorted(entries, key=lambda entry: float(entry.scores("test").mean()))
        predicted = predicted_test_delta_nll(comparison)
        columns = {
            "Method": lambda entry: entry.name,
            "ΔNLL, test": lambda entry: f"{entry.scores('test').mean():.3f}",
            "Predicted": lambda entry, predicted=predicted: (
                f"{predicted[entry.name]:.3f}" if entry.name in predicted else "-"
            ),
            "ΔNLL, calibration": lambda entry: f"{entry.scores('calibration').mean():.3f}",
            "Seeds": lambda entry: str(len(entry.runs)),
            "Evaluations": lambda e: f"{e.evaluations:,.0f} + {e.setup_evaluations:,}",
            "Time": lambda entry: seconds(entry.decision_s),
        }
        measured = {entry.name: float(entry.scores("test").mean()) for entry in entries}
        pairs = [(value, measured[name]) for name, value in predicted.items()]
        agreement = (
            f"Rank correlation of *Predicted* and *ΔNLL, test* over the {len(predicted)} methods: "
            f"{spearman(*np.array(pairs).T):.2f}."
        )
        table = markdown(columns_table(entries, columns))
        parts.append(f"### {', '.join(names)}\n\n{table.strip()}\n\n{agreement}")
    return "\n\n".join(parts) + "\n"


def load_generator_text() -> str:
    """A line for each report of the load generator."""
    lines = []
    for name, label in (("rap", "rap serve"), ("llama_cpp", "llama.cpp's server, f16 cache")):
        report = json.loads((RESULTS / "load_generator" / f"{name}.json").read_text("utf-8"))
        (benchmark,) = report["benchmarks"]
        metrics, totals = benchmark["metrics"], benchmark["metrics"]["request_totals"]
        errors = totals["errored"] + totals["incomplete"]
        line = [label, f"{totals['successful']}", f"{errors}"]
        for metric, factor, digits in (
            ("time_to_first_token_ms", 1e-3, 2), ("inter_token_latency_ms", 1e-3, 3),
            ("request_latency", 1.0, 2),
        ):  # fmt: skip
            values = metrics[metric]["successful"]["percentiles"]
            line += [f"{factor * values[p]:.{digits}f} s" for p in ("p50", "p95")]
        lines.append(line)
    header = ["Server", "Requests", "Errors", "TTFT p50", "p95", "ITL p50", "p95", "Latency p50",
              "p95"]  # fmt: skip
    return markdown((header, lines))
