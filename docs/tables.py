"""Tables: comparisons, studies, leaderboards, benchmarks from committed records, and tasks."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pandas as pd

from benchmarks.measuring import BenchmarkRecord, committed_records, targets_table
from benchmarks.step import TASKS as STEP_TASKS
from experiments.compare import compare
from experiments.comparison.result_rows import ResultRow, rows_below
from experiments.comparison.result_tables import tables_markdown
from experiments.comparison.summaries import Comparison, Summary
from experiments.config.program_settings import CompareConfig
from experiments.studies import cgroup
from experiments.studies.equal_process import rows as equal_process
from experiments.studies.equal_process import study as equal_process_study
from experiments.study.harness import Study
from experiments.study.plotting import look
from experiments.study.statistics import paired_ratio
from experiments.study.table_format import columns_table, markdown, percent, seconds
from experiments.unseen import ORDER, RUNS, UnseenRecord
from rap_env.leaderboard.entries import (
    UNCHOSEN,
    Entry,
    TableValues,
    nested_shares,
    published_entries,
    table_values,
)
from rap_env.leaderboard.tasks import pinned_task, pinned_tasks, tasks_of
from rap_env.plan import Plan
from rap_env.scoring.fidelity import spearman

RESULTS = Path(__file__).resolve().parents[1] / "results"


class Source(NamedTuple):
    """Rows of a folder of ``results/``: all, or those of a method, under another name."""

    folder: str
    method: str = ""
    shown_as: str = ""

    @property
    def rows(self) -> list[ResultRow]:
        """The rows."""
        rows = rows_below(RESULTS / self.folder / "evaluate")
        own = (row for row in rows if self.method in ("", row.method))
        return [replace(row, method=self.shown_as or row.method) for row in own]


COMPARISONS = (
    "tight", "low_bits", "tight_low_bits", "tight_gemma", "low_bits_gemma", "tight_outside",
    "learning",
)  # fmt: skip
"""Folders of ``results/`` with a comparison, whose summary a page shows."""


class Shown(NamedTuple):
    """Committed records of a study."""

    study: Study
    records: str

    @property
    def rows(self) -> list[Any]:
        """The records."""
        return self.study.read(RESULTS / self.records)


STUDIES = {
    "equal_process": Shown(equal_process_study.STUDY, "equal_process"),
    "cgroup": Shown(cgroup.STUDY, "cgroup"),
    "cgroup_conversations": Shown(cgroup.STUDY, "cgroup_conversations"),
}
"""The studies, by the name of their markers."""

SHOWN = {*COMPARISONS, *STUDIES} - {"cgroup_conversations", "low_bits_gemma"}
"""Comparisons and studies of which a page shows tables, between markers of that name."""


@cache
def full_text(name: str) -> str:
    """All tables of a comparison or study."""
    if name in COMPARISONS:
        return compare(CompareConfig(runs=str(RESULTS / name), format="markdown"))
    return STUDIES[name].study.markdown(STUDIES[name].rows)


def summary_of(text: str) -> str:
    """The first table of a comparison."""
    return text.partition("\n## ")[0].partition("\n")[2].strip() + "\n"


def shown_text(name: str) -> str:
    """What the page of a comparison or study shows of its tables."""
    if name in COMPARISONS:
        return summary_of(full_text(name))
    return full_text(name).partition("\n")[2].replace("\n## ", "\n### ")


def ranked_text() -> str:
    """The policy's best plan of eight, and all other methods at the same requests."""
    rows = Source("tight_ranked", "rap", "rap-best of 8").rows
    cells = {row.cell for row in rows}
    rows += [row for row in Source("tight").rows if row.cell in cells and row.method != "dense"]
    return summary_of(tables_markdown(Comparison(rows)))


def greyed(text: str) -> str:
    """A predicted value, which the style sheet sets in grey."""
    return f'<span class="predicted">{text}</span>'


def leaderboard_table(comparison: str) -> str:
    """The published entries of a comparison, the best on held-out text first.

    An entry whose plans were not all measured has no rank: it comes last.
    """
    names = ", ".join(f"`{task.name}`" for task in tasks_of(comparison))
    published = published_entries(comparison)
    entries = [entry for entry in published if entry.origin["method"] not in UNCHOSEN]
    by_table, nested = table_values(comparison), nested_shares(comparison)

    def measured(entry: Entry, split: str) -> float:
        return float(entry.scores(split).mean()) if entry.measured_on(split) else math.inf

    def shown(entry: Entry, split: str) -> str:
        return f"{measured(entry, split):.3f}" if entry.measured_on(split) else "-"

    def by_table_alone(entry: Entry, show: Callable[[TableValues], str]) -> str:
        return show(by_table[entry.name]) if entry.name in by_table else "-"

    columns: dict[str, Callable[[Entry], str]] = {
        "Method": lambda e: e.name,
        "ΔNLL, test": lambda e: shown(e, "test"),
        "Predicted": lambda e: by_table_alone(e, lambda v: greyed(f"{v.test:.3f}")),
        "ΔNLL, calibration": lambda e: shown(e, "calibration"),
        "Predicted (plans)": lambda e: by_table_alone(
            e,
            lambda v: (
                greyed(f"{v.calibration:.3f} ({v.num_predicted})") if v.num_predicted else "-"
            ),
        ),
        "Nested": lambda e: percent(nested[e.name], 0) if e.name in nested else "-",
        "Seeds": lambda e: str(len(e.runs)),
        "Evaluations": lambda e: f"{e.evaluations:,.0f} + {e.setup_evaluations:,}",
        "Time": lambda e: seconds(e.decision_s),
    }
    ranked = sorted(entries, key=lambda e: measured(e, "test"))
    table = markdown(columns_table(ranked, columns))
    known = [e for e in entries if e.name in by_table and e.measured_on("test")]
    if not known:  # the model itself ran for every plan
        return f"### {names}\n\n{table}"
    pairs = np.array([(by_table[e.name].test, measured(e, "test")) for e in known])
    return (
        f"### {names}\n\n{table}\nRank correlation of *Predicted* and *ΔNLL, test* over the "
        f"{len(known)} methods: {spearman(*pairs.T):.2f}.\n"
    )


def leaderboards(*models: str) -> str:
    """The published entries of the tasks on some models."""
    names = dict.fromkeys(task.comparison for task in pinned_tasks().values())
    return "\n".join(leaderboard_table(name) for name in names if name.startswith(models))


METHODS = {
    "rap": "a trained network, no run of the model",
    "frontier": "the best of the measured plans that fits",
    "score_model": "a local search on predicted losses",
    "uniform": "one level for all, then whole blocks, tuned by hand",
    "knapsack": "adds up costs measured one by one",
}
"""The methods in the table of the leaderboard's page, with what each does."""


def method_rows(folder: str) -> list[ResultRow]:
    """The rows of `METHODS` in a comparison."""
    return [row for row in Source(folder).rows if row.method in METHODS]


def by_method(folder: str) -> dict[str, Summary]:
    """The summary of each of `METHODS` in a comparison."""
    return {summary.method: summary for summary in Comparison(method_rows(folder)).summaries}


def methods_table() -> str:
    """The table of methods, the least ΔNLL first."""
    two = by_method("low_bits")
    columns: dict[str, Callable[[Summary], str]] = {
        "Method": lambda s: f"{look(s.method).label}: {METHODS[s.method]}",
        "Down to four bits": lambda s: str(s.delta_nll),
        "Down to two bits": lambda s: str(two[s.method].delta_nll) if s.method in two else "-",
        "Decision, four bits": lambda s: seconds(s.decision_s),
    }
    return markdown(columns_table(by_method("tight").values(), columns))


@cache
def unseen() -> UnseenRecord:
    """The evaluations on tasks across models, by ``python -m experiments.unseen``."""
    return UnseenRecord(RESULTS / "unseen" / "record.json")


def unseen_table() -> str:
    """Scores on the models that no method was trained or tuned on, the best without a run first."""
    rows = [[n, *(str(unseen().estimate(n, runs) or "-") for runs in RUNS)] for n in unseen().names]
    return markdown(pd.DataFrame(rows, columns=["Method", *(f"{runs} runs" for runs in RUNS)]))


def unseen_real_table() -> str:
    """What plans lose on real models that no network saw, over what those of the order lose."""
    cells = defaultdict[str, dict[str, str]](dict)
    for model, made in unseen().body["real"].items():
        losses = {name: np.mean(of["delta_nll"], axis=0) for name, of in made["methods"].items()}
        for name, own in losses.items():
            cells[name][model] = str(paired_ratio([own], [losses[ORDER]]))
        cells[ORDER][model] = f"{losses[ORDER].mean():.3f} nats"
    models = [*unseen().body["real"]]
    rows = [[name, *(own.get(model, "-") for model in models)] for name, own in cells.items()]
    return markdown(pd.DataFrame(rows, columns=["Method", *models]))


def process_table() -> str:
    """Loss and speed of both servers in equal memory, in README.md."""
    tables = equal_process.process_tables(STUDIES["equal_process"].rows)
    lines = tables[0].table[2:]  # without the largest
    rap, other = (lines[start::2].reset_index() for start in (0, 1))
    columns = {"Memory": rap["Limit"]}
    for what, column in {"loss": "ΔNLL", "tokens/s": "Answer"}.items():
        for system, own in {"rap serve": rap, "llama.cpp": other}.items():
            columns[f"{system}, {what}"] = own[column].str.partition(" ")[0]
    return markdown(pd.DataFrame(columns))


def preparing_table() -> str:
    """What plans of prepared models lose, a row for each plan that lowers anything."""
    records = [r for r in committed_records() if r.benchmark.startswith("preparing")]
    lines = [
        (r, plan) for r in records for plan in r.measured["plans"] if Plan.from_json(plan["plan"])
    ]

    def rise(kind: str, line: tuple[BenchmarkRecord, dict[str, Any]]) -> str:
        return f"{line[1]['delta_nll'][kind]:.3f}"

    columns: dict[str, Callable[[tuple[BenchmarkRecord, dict[str, Any]]], str]] = {
        "Model": lambda line: line[0].measured["model"],
        "Levels": lambda line: line[0].measured["levels"],
        "Budget": lambda line: f"{line[1]['budget_mib']:,.0f} MiB",
        "Predicted": lambda line: f"{line[1]['predicted']:.3f}",
        **{kind.capitalize(): partial(rise, kind) for kind in ("articles", "code", "chat")},
    }
    return markdown(columns_table(lines, columns), left=2)


def preparing_times() -> str:
    """What preparing took where the cache was empty, a row for each model and kind of levels."""
    records = [r for r in committed_records() if r.measured.get("taken") is not None]

    def levels(record: BenchmarkRecord) -> str:
        limit_mib, made = record.settings.get("memory_mib"), record.measured["levels"]
        return made if limit_mib is None else f"{made}, `--memory {limit_mib:.0f}MiB`"

    columns: dict[str, Callable[[BenchmarkRecord], str]] = {
        "Model": lambda record: record.measured["model"],
        "Levels": levels,
        "CPU minutes": lambda record: f"{record.measured['taken']['cpu_s'] / 60:.1f}",
        "Most resident memory": lambda record: (
            f"{record.measured['taken']['peak_bytes'] / 2**20:,.0f} MiB"
        ),
    }
    return markdown(columns_table(records, columns), left=2)


def speed_table() -> str:
    """The targets of all benchmarks but those of what prepared models lose."""
    records = [r for r in committed_records() if not r.benchmark.startswith("preparing")]
    return targets_table(records)


def bounds_table() -> str:
    """What a table with bounds predicts, beside what plans lose, by method and training seed."""
    scorer = pinned_task("RAPLadder/SmolLM2-Table-v1").make().unwrapped.context.scorer
    plans = pd.DataFrame(
        {
            "Method": look(row.method).label,
            "Seed": str(row.depends_on["seed"]),
            "is_new": scorer.is_predicted(row.plan),
            "Predicted": scorer.nll(row.plan) - scorer.native_nll,
            "Measured": row.delta_nll,
        }
        for row in Source("tight_bounds_seeds").rows
    )
    new = plans[plans["is_new"]].groupby(["Method", "Seed"], sort=False)
    parts = [new.size().astype(str).rename("New plans")]
    for of, end in ((new, ""), (plans.groupby(["Method", "Seed"], sort=False), ", all")):
        means = of[["Predicted", "Measured"]].mean()
        shown = means.map("{:.3f}".format)
        shown["Difference"] = (means["Predicted"] / means["Measured"] - 1).map(percent)
        parts.append(shown.add_suffix(end))
    return markdown(pd.concat(parts, axis="columns").reset_index())


_EPISODES = 40  # with random actions, for the lengths of episodes

MASK = "action_mask"

UNSEEN = "RAPLadder/Unseen-Tune-v1"

README_TASKS = (
    UNSEEN,
    "RAPLadder/SmolLM2-Table-v1",
    "RAPLadder/SmolLM2-LowBits-Table-v0",
    "RAPLadder/Gemma3-270M-Table-v1",
    STEP_TASKS[0],
)

LISTED_TASKS = [name for name in pinned_tasks() if "-Table-" in name or "Tiny" in name]


def random_steps(env: gym.Env[Any, Any], seed: int) -> int:
    """The steps of an episode with random actions."""
    observation, _ = env.reset(seed=seed)
    env.action_space.seed(seed)
    steps, ended = 0, [False]
    while not any(ended):
        action = env.action_space.sample(observation[MASK])
        observation, _, *ended, _ = env.step(action)
        steps += 1
    return steps


@cache
def task_row(name: str) -> list[str]:
    """A pinned task: its spaces, speed, and the least ΔNLL of a published method."""
    (speeds,) = (r.measured["steps_per_s"] for r in committed_records() if r.benchmark == "step")
    env = gym.make(name)
    lengths = [random_steps(env, seed) for seed in range(_EPISODES)]
    low, middle, high = np.percentile(lengths, [5, 50, 95])
    seen = [f"`{key}` {box.shape}" for key, box in env.observation_space.items() if key != MASK]
    speed = speeds.get(f"{name}, 1024")
    return [
        f"`{name}`",
        ", ".join(seen),
        str(env.action_space.n),
        f"{middle:.0f} ({low:.0f} to {high:.0f})",
        f"{round(speed, -3):,.0f}" if speed else "-",
        to_beat(name),
    ]


def to_beat(name: str) -> str:
    """The least published loss on a task, and the method that has it."""
    if name == UNSEEN:
        best = unseen().names[0]
        return f"{str(unseen().estimate(best, 0)).split()[0]} of the order's ({best})"
    scores = {
        entry.name: float(entry.scores("test").mean())
        for entry in published_entries(pinned_task(name).comparison)
        if entry.origin["method"] not in UNCHOSEN and entry.measured_on("test")
    }
    best = min(scores, key=scores.__getitem__, default=None)
    return "-" if best is None else f"{scores[best]:.3f} ({best})"


def tasks_table(names: Sequence[str]) -> str:
    """Pinned tasks, a row each."""
    header = ["Task", "Observation", "Actions", "Steps of an episode", "Steps a second", "To beat"]
    return markdown(pd.DataFrame(map(task_row, names), columns=header))
