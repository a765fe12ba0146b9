"""Generates what the documentation does not type: ``python docs/generate.py``.

It writes the tables into the pages, between their markers, and the pictures; all are committed.
`docs/conf.py` makes the rest at each build, into ``docs/_generated`` and
``docs/results/details``. All numbers come from the records in ``results/``: see
`record_tables`, `task_tables` and `pictures`.
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

import click

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import record_tables as tables
from pictures import episode, save_pictures
from record_tables import COMPARISONS, RESULTS, STUDIES, full_text, leaderboards, unseen
from task_tables import LISTED_TASKS, README_TASKS, tasks_table

import rap_env
from experiments import live
from experiments.studies.replay import cgroup
from experiments.study.table_format import percent
from experiments.unseen import POLICY
from rap_env.cli import cli
from rap_env.serving.responses_api import ResponsesRequest
from rap_env.serving.schemas import ChatCompletionRequest, CompletionRequest

ENVIRONMENTS = {
    "environment": ("RAPPrune-v0", "RAPPruneEnv"),
    "environment_ladder": ("RAPLadder-v0", "RAPLadderEnv"),
}
"""The page of each environment, with its name and class."""

TABLES: dict[str, Callable[[], str | None]] = {
    "methods": tables.methods_table,
    "tasks": partial(tasks_table, README_TASKS),
    "process": tables.process_table,
    "table_tasks": partial(tasks_table, LISTED_TASKS),
    "bounds": tables.bounds_table,
    "unseen": tables.unseen_table,
    "unseen_real": tables.unseen_real_table,
    "preparing": tables.preparing_table,
    "preparing_times": tables.preparing_times,
    **{
        name: partial(tables.shown_text, name) for name in {*COMPARISONS, *STUDIES} - tables.DETAILS
    },
    "tight_ranked": tables.ranked_text,
    "entries": lambda: leaderboards("SmolLM2", "Gemma3"),
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
        "unseen_policy": str(unseen().estimate(POLICY, 0)),
        "unseen_regression": str(unseen().estimate("Regression", 0)),
        "unseen_search": str(unseen().estimate("Evolution", 64)),
        "unseen_seeds": unseen().by_seed(POLICY),
        "unseen_evaluations": str(unseen().body["test_evaluations"]),
    }


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
    save_pictures()


if __name__ == "__main__":
    main()
