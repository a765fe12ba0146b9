"""Generates what the documentation does not type: ``python docs/generate.py``.

It writes the tables into the pages, between their markers, and the pictures; all are committed.
`docs/conf.py` makes the rest at each build, into ``docs/_generated`` and
``docs/results/details``. All numbers come from the records in ``results/``; `tables` has the
tables, this module all else.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import re
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import gymnasium as gym
import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import tables
from tables import COMPARISONS, MASK, README_TASKS, RESULTS, STUDIES, Source

import rap_env
from experiments import live
from experiments.comparison.summaries import Comparison, compare_pair
from experiments.studies import cgroup
from experiments.studies.equal_process import rows as equal_process
from experiments.study.plotting import FAINT, INK, Panel, look, panel_figure, save_gif, save_png
from experiments.study.table_format import percent, seconds
from experiments.unseen import POLICY, generalisation
from rap_env.cli import cli
from rap_env.ladder.features import ITEM_FEATURES
from rap_env.serving.responses_api import ResponsesRequest
from rap_env.serving.schemas import ChatCompletionRequest, CompletionRequest

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

IMAGES = ROOT / "docs" / "images"
ENVIRONMENTS = {
    "environment": ("RAPPrune-v0", "RAPPruneEnv"),
    "environment_ladder": ("RAPLadder-v0", "RAPLadderEnv"),
}
"""The page of each environment, with its name and class."""

TABLES: dict[str, Callable[[], str | None]] = {
    "methods": tables.methods_table,
    "tasks": partial(tables.tasks_table, README_TASKS),
    "process": tables.process_table,
    "table_tasks": partial(tables.tasks_table, tables.LISTED_TASKS),
    "bounds": tables.bounds_table,
    "unseen": tables.unseen_table,
    "unseen_real": tables.unseen_real_table,
    "preparing": tables.preparing_table,
    "preparing_times": tables.preparing_times,
    **{name: partial(tables.shown_text, name) for name in tables.SHOWN},
    "tight_ranked": tables.ranked_text,
    "entries": lambda: tables.leaderboards("SmolLM2", "Gemma3"),
    **{p: partial(inspect.getdoc, getattr(rap_env, c)) for p, (_, c) in ENVIRONMENTS.items()},
    "benchmarks": tables.speed_table,
}
"""What stands between ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->`` of a page, by
name."""


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
        "unseen_policy": str(tables.unseen().estimate(POLICY, 0)),
        "unseen_quadratic": str(tables.unseen().estimate("Quadratic knapsack", 0)),
        "unseen_search": str(tables.unseen().estimate("Evolution", 64)),
        "unseen_seeds": tables.unseen().by_seed(POLICY),
        "unseen_evaluations": str(tables.unseen().body["test_evaluations"]),
    }


SEARCHES = (
    Source("tight_greedy", "greedy_per_byte"),
    Source("tight_searches", "evolutionary"),
    Source("tight_searches", "beam"),
)
"""Searches for one request of `tight`."""

_OFFSETS = {  # of labels that would overlap others
    "rap": (9, 5),
    "frontier": (9, -1),
    "score_model": (9, -13),
    "greedy_per_byte": (-120, 11),
    "evolutionary": (9, 6),
    "beam": (15, -3),
}


def decision_cost() -> Figure:
    """Draw ΔNLL relative to the policy's against the runs of the model for one request.

    The searches were run at a few of the requests and budgets only, where they are compared.
    """
    rows = tables.method_rows("tight") + [row for search in SEARCHES for row in search.rows]
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
    pages = {name: tables.full_text(name) for name in (*COMPARISONS, *STUDIES)}
    pages["tiny_entries"] = f"# Entries on tiny models\n\n{tables.leaderboards('Tiny')}"
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
    for name, figure in {
        "decision_cost": decision_cost(),
        "equal_process": equal_process.process_figure(STUDIES["equal_process"].rows),
        "unseen_models": generalisation(tables.unseen()),
    }.items():
        save_png(figure, IMAGES / f"{name}.png")
    save_gif(episode()[0], IMAGES / "episode.gif")


if __name__ == "__main__":
    main()
