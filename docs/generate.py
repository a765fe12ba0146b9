"""Generates what the documentation does not type: tables, environment pages, pictures.

``python docs/generate.py`` writes the tables into the pages, between their markers, and
pictures; all are committed. `docs/conf.py` makes the rest at each build, into
``docs/_generated`` and ``docs/results/details``. All numbers come from the records in
``results/``.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
import gymnasium as gym
import numpy as np
import pandas as pd
from PIL import Image

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import rap_env
from benchmarks.measuring import BenchmarkRecord, committed_records, targets_table
from benchmarks.step import TASKS as STEP_TASKS
from experiments import live
from experiments.compare import compare
from experiments.comparison.result_rows import ResultRow, rows_below
from experiments.comparison.result_tables import tables_markdown
from experiments.comparison.summaries import Comparison, Summary, compare_pair
from experiments.config.program_settings import CompareConfig
from experiments.studies.equal_process import rows as equal_process
from experiments.studies.equal_process import study as equal_process_study
from experiments.studies.replay import cgroup, conversations
from experiments.studies.replay import study as replay
from experiments.study.harness import Study
from experiments.study.plotting import FAINT, INK, Panel, look, panel_figure, save_gif, save_png
from experiments.study.statistics import paired_ratio
from experiments.study.table_format import columns_table, markdown, percent, seconds
from experiments.unseen import ORDER, POLICY, RUNS, UnseenRecord, generalisation
from rap_env.cli import cli
from rap_env.ladder.features import ITEM_FEATURES
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
from rap_env.scoring.fidelity import Floats, spearman
from rap_env.serving.responses_api import ResponsesRequest
from rap_env.serving.schemas import ChatCompletionRequest, CompletionRequest

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
IMAGES = ROOT / "docs" / "images"
ENVIRONMENTS = {
    "environment": ("RAPPrune-v0", "RAPPruneEnv"),
    "environment_ladder": ("RAPLadder-v0", "RAPLadderEnv"),
}
"""The page of each environment, with its name and class."""


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

DETAILS = {"cgroup_conversations", "low_bits_gemma"}
"""Comparisons and studies whose tables stand on pages of their own alone."""

_GREEDY = "greedy_per_byte"
SEARCHES = {
    "tight_greedy": Source("tight_greedy", _GREEDY),
    "tight_evolutionary": Source("tight_searches", "evolutionary"),
    "tight_beam": Source("tight_searches", "beam"),
}
"""Searches for one request of `tight`, by name."""


class Shown(NamedTuple):
    """Committed records of a study, and the sections of its tables that a page shows."""

    study: Study
    records: str
    sections: tuple[str, ...] = ("",)

    @property
    def rows(self) -> list[Any]:
        """The records."""
        return self.study.read(RESULTS / self.records)


_QUALITY = ("Quality",)
STUDIES = {
    "equal_process": Shown(equal_process_study.STUDY, "equal_process"),
    "replay": Shown(replay.STUDY, "replay/replay", _QUALITY),
    "replay_ladder": Shown(replay.STUDY, "ladder/replay", _QUALITY),
    "replay_low_bits": Shown(replay.STUDY, "replay_low_bits/replay", _QUALITY),
    "conversations": Shown(conversations.STUDY, "conversations"),
    "cgroup": Shown(cgroup.STUDY, "cgroup"),
    "cgroup_conversations": Shown(cgroup.STUDY, "cgroup_conversations"),
}
"""The studies, by the name of their markers."""


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
    first, *sections = full_text(name).partition("\n")[2].split("\n## ")
    shown = [section for section in sections if section.startswith(STUDIES[name].sections)]
    if len(shown) == 1:  # needs no heading
        return first + shown[0].partition("\n")[2]
    return "\n### ".join([first, *shown])


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


@cache
def compared(folder: str) -> Comparison:
    """A comparison of `METHODS`."""
    return Comparison(method_rows(folder))


def by_method(folder: str) -> dict[str, Summary]:
    """The summary of each of `METHODS` in a comparison."""
    return {summary.method: summary for summary in compared(folder).summaries}


@cache
def unseen() -> UnseenRecord:
    """The evaluations on tasks across models, by ``python -m experiments.unseen``."""
    return UnseenRecord(RESULTS / "unseen" / "record.json")


def unseen_table() -> str:
    """Scores on the models that no method was trained or tuned on, a row for each method."""
    names = dict.fromkeys(row["name"] for row in unseen().body["rows"])
    rows = [[n, *(str(unseen().estimate(n, runs) or "-") for runs in RUNS)] for n in names]
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


def test_scores(task: str) -> dict[str, Floats]:
    """What entries that were measured on a task's test text score at each request, by name."""
    entries = published_entries(pinned_task(task).comparison)
    return {e.name: e.scores("test") for e in entries if e.measured_on("test")}


@cache
def readme_numbers() -> dict[str, str]:
    """The numbers within sentences of README.md."""
    rap, other = map(cgroup.measures, STUDIES["cgroup"].rows[:2])
    more_tokens = float(other["Tokens a second"]) / float(rap["Tokens a second"]) - 1
    recording = live.recorded(RESULTS / "live")
    assert recording is not None  # committed
    code = (ROOT / "README.md").read_text("utf-8").partition("```python\n")[2].partition("```")[0]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, {})
    return {
        "film": recording.summary,
        "episode": f"{episode()[1]:.2f}",
        "printed": printed.getvalue().strip(),
        "more_tokens": percent(more_tokens, 0),
        "unseen_policy": str(unseen().estimate(POLICY, 0)),
        "unseen_regression": str(unseen().estimate("Regression", 0)),
        "unseen_search": str(unseen().estimate("Evolution", 64)),
        "unseen_seeds": unseen().by_seed(POLICY),
        "unseen_evaluations": str(unseen().body["test_evaluations"]),
    }


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
        return f"{str(unseen().estimate(POLICY, 0)).split()[0]} of the order's ({POLICY})"
    entries = published_entries(pinned_task(name).comparison)
    unchosen = {entry.name for entry in entries if entry.origin["method"] in UNCHOSEN}
    scores = {of: float(each.mean()) for of, each in test_scores(name).items()}
    best = min(scores.keys() - unchosen, key=scores.__getitem__, default=None)
    return "-" if best is None else f"{scores[best]:.3f} ({best})"


def tasks_table(names: Sequence[str]) -> str:
    """Pinned tasks, a row each."""
    header = ["Task", "Observation", "Actions", "Steps of an episode", "Steps a second", "To beat"]
    return markdown(pd.DataFrame(map(task_row, names), columns=header))


LOW_BITS = "RAPLadder/SmolLM2-LowBits-Table-v0"


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


def speed_table() -> str:
    """The targets of all benchmarks but those of what prepared models lose."""
    records = [r for r in committed_records() if not r.benchmark.startswith("preparing")]
    return targets_table(records)


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


def bounds_table() -> str:
    """What a table with bounds predicts, beside what plans lose, by method and training seed."""
    scorer = pinned_task("RAPLadder/SmolLM2-Table-v1").make().unwrapped.context.scorer
    plans = pd.DataFrame(
        {
            "Method": look(row.method).label,
            "Seed": str(row.depends_on["seed"]),
            "is_new": scorer.is_predicted(row.plan),
            "Predicted": scorer.nll(row.plan) - scorer.dense_nll,
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
    LOW_BITS,
    "RAPLadder/Gemma3-270M-Table-v1",
    STEP_TASKS[0],
)
LISTED_TASKS = [name for name in pinned_tasks() if "-Table-" in name or "Tiny" in name]


_OFFSETS = {  # of labels that would overlap others
    "rap": (9, 5),
    "frontier": (9, -1),
    "score_model": (9, -13),
    _GREEDY: (-120, 11),
    "evolutionary": (9, 6),
    "beam": (15, -3),
}


def decision_cost() -> Figure:
    """Draw ΔNLL relative to the policy's against the runs of the model for one request.

    The searches were run at a few of the requests and budgets only, where they are compared.
    """
    rows = method_rows("tight") + [row for search in SEARCHES.values() for row in search.rows]
    compared, most = Comparison(rows), len({row.cell for row in rows})
    style: dict[str, Any] = {"markersize": 7, "capsize": 3, "elinewidth": 1}

    def draw(axis: Axes) -> None:
        for method in compared.methods:
            own = [row for row in compared.rows if row.method == method]
            cells, shown = sorted({row.cell for row in own}), look(method)
            pair = compare_pair(compared, method, "rap", cells)
            change = pair.relative if pair else None
            if change is None and method != "rap":
                continue
            mean, low, high = (change.mean, change.low, change.high) if change else (0, 0, 0)
            runs, few = [row.evaluations for row in own], len(cells) < most
            x, y = float(np.mean(runs)), 1 + mean
            yerr, xerr = [[mean - low], [high - mean]], [[x - min(runs)], [max(runs) - x]]
            look_of = {"fmt": shown.marker, "color": shown.colour, **style}
            axis.errorbar(x, y, yerr=yerr, xerr=xerr if few else None, **look_of)
            text = f"{shown.label}, {seconds(float(np.median([row.decision_s for row in own])))}"
            text += f" ({len(cells)} requests)" if few else ""
            words = {"xytext": _OFFSETS.get(method, (9, -3)), "textcoords": "offset points"}
            axis.annotate(text, (x, y), **words, fontsize=8, color=INK)
        axis.axhline(1, color=FAINT, linewidth=0.8, linestyle=":")
        axis.set_xscale("symlog", linthresh=1)
        axis.set_xticks([0, 1, 10, 100, 1000], ["0", "1", "10", "100", "1,000"])
        axis.set_xlim(-0.15, 9000)

    panel = Panel(draw, x="runs of the model for one request", y="mean ΔNLL / the policy's")
    return panel_figure([panel], height=3.3, legend=0)


@cache
def episode() -> tuple[list[Image.Image], float]:
    """Pictures of an episode in the greedy order, one after each third action, and its ΔNLL."""
    env = gym.make(README_TASKS[1], render_mode="rgb_array")
    request = {"batch_size": 8, "seq_len_tokens": 2048, "budget_fraction": 0.25}
    observation, _ = env.reset(seed=0, options={"request": request})
    images, over = [env.render()], False
    while not over:
        order = observation["ladder"][:, ITEM_FEATURES.index("order_place")]
        action = np.where(observation[MASK], order, np.inf).argmin()
        observation, _, *ends, info = env.step(action)
        over = any(ends)
        images.append(env.render())
    shown = [Image.fromarray(image).resize((720, 480)) for image in [*images[::3], images[-1]]]
    return shown, float(info["delta_nll"])


TABLES: dict[str, Callable[[], str | None]] = {
    "methods": methods_table,
    "tasks": partial(tasks_table, README_TASKS),
    "process": process_table,
    "table_tasks": partial(tasks_table, LISTED_TASKS),
    "bounds": bounds_table,
    "unseen": unseen_table,
    "unseen_real": unseen_real_table,
    "preparing": preparing_table,
    "preparing_times": preparing_times,
    **{name: partial(shown_text, name) for name in {*COMPARISONS, *STUDIES} - DETAILS},
    "tight_ranked": ranked_text,
    "entries": lambda: leaderboards("SmolLM2", "Gemma3"),
    **{p: partial(inspect.getdoc, getattr(rap_env, c)) for p, (_, c) in ENVIRONMENTS.items()},
    "benchmarks": speed_table,
}
"""What stands between ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->`` of a page, by
name."""


_MARKED = re.compile(r"(<!-- (\w+): begin -->\n).*?(<!-- \2: end -->)", re.DOTALL)
_NUMBER = re.compile(r"<!--(\w+)-->[^<]*<!---->")
_INTERVAL = re.compile(r"(\[[-+]?\d+\.\d+), ([-+]?\d+\.\d+\])")


def marked_pages() -> list[Path]:
    """README.md and the pages that have markers."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
    return [page for page in pages if _MARKED.search(page.read_text(encoding="utf-8"))]


def with_tables(page: str) -> str:
    """The text of a page with new tables and numbers; no interval is broken into two lines."""

    def filled(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        table = _INTERVAL.sub("\\1,\u00a0\\2", (TABLES[name]() or "").strip())
        return f"{begin}\n{table}\n\n{end}"

    page = _MARKED.sub(filled, page)
    return _NUMBER.sub(lambda match: f"<!--{match[1]}-->{readme_numbers()[match[1]]}<!---->", page)


def write_changed(path: Path, text: str) -> None:
    """Write a file only if its text changed, so that Sphinx rebuilds no more than it must."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def write_all(docs: Path) -> None:
    """Write every generated file that is not committed.

    Args:
        docs: The folder of the documentation's sources.
    """
    folder, details = docs / "_generated", docs / "results" / "details"
    for new in (folder, details):
        new.mkdir(exist_ok=True)
    pages = {name: full_text(name) for name in (*COMPARISONS, *STUDIES)}
    pages["tiny_entries"] = f"# Entries on tiny models\n\n{leaderboards('Tiny')}"
    for name, text in pages.items():
        write_changed(details / f"{name}.md", f"---\norphan: true\n---\n\n{text.strip()}\n")
    write_changed(folder / "commands.md", command_reference())
    write_changed(folder / "request_fields.md", request_fields())


def request_fields() -> str:
    """The fields of requests by kind, each with its description."""
    lines, shown = list[str](), set[str | None]()
    for title, model in {
        "Chats, and what all kinds share": ChatCompletionRequest,
        "Plain completions": CompletionRequest,
        "`/v1/responses`": ResponsesRequest,
    }.items():
        lines += ["", f"**{title}**", "", "| Field | |", "| :-- | :-- |"]
        for name, field in sorted(model.model_fields.items()):
            if field.description not in shown:
                lines.append(f"| `{name}` | {' '.join((field.description or '').split())} |")
                shown.add(field.description)
    return "\n".join(lines) + "\n"


def command_reference() -> str:
    """The help of ``rap`` and of each of its commands."""
    width = {"max_content_width": 92}
    top = click.Context(cli, info_name="rap", **width)
    contexts = [
        click.Context(command, parent=top, info_name=name, **width)
        for name, command in sorted(cli.commands.items())
    ]
    return "\n".join(
        f"## {context.command_path}\n\n```text\n{context.command.get_help(context)}\n```\n"
        for context in [top, *contexts]
    )


def main() -> None:
    """Write the committed tables and the pictures."""
    for page in marked_pages():
        write_changed(page, with_tables(page.read_text(encoding="utf-8")))
    save_png(decision_cost(), IMAGES / "decision_cost.png")
    figures = {"conversations": ("kept_bytes", conversations.memory_figure)}
    figures["equal_process"] = ("equal_process", equal_process.process_figure)
    for name, (image, draw) in figures.items():
        save_png(draw(STUDIES[name].rows), IMAGES / f"{image}.png")
    save_png(generalisation(unseen()), IMAGES / "unseen_models.png")
    save_gif(episode()[0], IMAGES / "episode.gif")


if __name__ == "__main__":
    main()
