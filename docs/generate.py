"""Generates what the documentation does not type: result tables, environment pages, pictures.

``python docs/generate.py`` writes ``docs/_generated``, and README.md's table and figure;
`docs/conf.py` writes the former at each build. All numbers come from the records in ``results/``.
"""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import tables
from architecture import draw_architecture
from tables import GEMMA, OUTSIDE, PLANS, RANKED, RESULTS, ROOT, SEARCHES, shown_tables

import rap_env
from benchmarks.record import markdown as benchmarks_text
from benchmarks.record import read_records as read_benchmarks
from experiments.ladder.rows import read_ladder
from experiments.ladder.study import STUDY as LADDER
from experiments.learning_curves import learning_curves, read_curves
from experiments.long_context.study import STUDY as LONG_CONTEXT
from experiments.repair.study import STUDY as REPAIR
from experiments.replay.study import STUDY as REPLAY
from experiments.studies.prompts import STUDY as PROMPTS
from experiments.studies.texts import STUDY as TEXTS
from experiments.study.figures import save_png
from experiments.study.harness import Study
from rap_env.cli import cli

ENVIRONMENTS = {
    "environment": ("RAPPrune-v0", "RAPPruneEnv"),
    "environment_ladder": ("RAPLadder-v0", "RAPLadderEnv"),
}
"""The page of each environment, with its name and class."""
EPISODE = "![An episode: items are lowered until the request fits](images/episode.gif)"
"""What `docs/episode_gif.py` draws."""

PLAN_COMPARISONS = (PLANS, GEMMA, OUTSIDE)
COMPARISONS = (
    "learning", "learning_scratch", "evolution", "small_unequal", "small_uniform", "transfer",
    "learning_library", "seeds",
)  # fmt: skip
"""Folders of ``results/`` with a comparison of methods that choose masks."""
TRANSFERS = ("tight_transfer_gemma", "tight_transfer_smollm2")
"""Comparisons with policies of the other model."""
STUDIES: dict[str, tuple[Study[Any], Path]] = {
    "replay": (REPLAY, RESULTS / "replay" / "replay"),
    "replay_ladder": (REPLAY, RESULTS / "ladder" / "replay"),
    "long_context": (LONG_CONTEXT, RESULTS / "long_context"),
    "tight_recall": (LONG_CONTEXT, RESULTS / "tight_recall" / "long_context"),
    "texts": (TEXTS, RESULTS / "texts"),
    "prompts": (PROMPTS, RESULTS / "prompts"),
    "repair": (REPAIR, RESULTS / "repair" / "repair"),
}
"""Each study with its records, by the name under which the pages include it."""

LADDER_FIGURE = "loss_against_bytes.png"

PAGES: dict[str, Callable[[], str]] = {
    "tight_stubs": tables.stubs_text,
    **{ranked: partial(tables.ranked_text, name) for name, ranked in RANKED.items()},
    "tight_shipped": tables.shipped_text,
    **{name: partial(tables.search_text, *search) for name, search in SEARCHES.items()},
    "tight_tasks": tables.tasks_text,
    "floor_tasks": partial(tables.tasks_text, "floor_tasks"),
    "tight_agents": tables.agents_text,
    "ablation": tables.ablation_text,
    "soak": tables.soak_text,
    "soak_floor": tables.floor_text,
    "load_generator": tables.load_generator_text,
    "benchmarks": lambda: benchmarks_text(read_benchmarks()) + "\n",
    "engine_features": tables.features_text,
    "engines": tables.agreement_text,
    "results_readme": lambda: (RESULTS / "README.md").read_text(encoding="utf-8"),
    "ladder": lambda: below(LADDER.markdown(read_ladder(RESULTS / "ladder"))),
}
"""The text of each other page, by its name."""


def write_all(docs: Path) -> None:
    """Write every generated file.

    Args:
        docs: The folder of the documentation's sources.
    """
    folder = docs / "_generated"
    folder.mkdir(exist_ok=True)
    details = {name: tables.comparison_text(name) for name in (*PLAN_COMPARISONS, *COMPARISONS)}
    details |= {name: tables.transfer_text(name) for name in TRANSFERS}
    for name, text in details.items():
        shown = tables.first_tables(text) if name in COMPARISONS else shown_tables(text)
        write(folder / f"{name}.md", shown)
    for name in STUDIES:
        details[name] = text = study_text(name)
        if name in ("long_context", "tight_recall"):
            text = text.split("\n## ")[1].partition("\n")[2]
        elif name == "repair":
            text = shown_tables(text, ())
        elif name in ("texts", "prompts"):
            text = text.partition("\n")[2]
        else:
            text = below(text)
        write(folder / f"{name}.md", text)
        draw_study(folder, name)
    (docs / "results" / "details").mkdir(exist_ok=True)
    for name, text in details.items():
        page = f"---\norphan: true\n---\n\n{text.strip()}\n"
        write(docs / "results" / "details" / f"{name}.md", page)
    for name, make in PAGES.items():
        write(folder / f"{name}.md", make())
    figure = LADDER.figures["loss_against_bytes"](read_ladder(RESULTS / "ladder"), False)
    save_png(figure, folder / LADDER_FIGURE)
    save_png(learning_curves(read_curves(RESULTS / "examples")), folder / "learning_curves.png")
    draw_architecture(folder / "architecture.svg")
    write(folder / "commands.md", command_reference())
    write(folder / "api.md", api_page())


def committed_pages(docs: Path) -> dict[Path, str]:
    """The pages that are read in the repository too and hold generated text, with that text."""
    pages = {}
    for page, (name, kind) in ENVIRONMENTS.items():
        text = inspect.cleandoc(getattr(rap_env, kind).__doc__ or "")
        pages[docs / f"{page}.md"] = f"# {name}\n\n{EPISODE}\n\n{text}\n"
    board = docs / "leaderboard.md"
    before, begin, rest = board.read_text(encoding="utf-8").partition("<!-- entries: begin -->\n")
    end = rest[rest.index("<!-- entries: end -->") :]
    pages[board] = f"{before}{begin}{tables.leaderboard_text()}\n{end}"
    return pages


def write(path: Path, text: str) -> None:
    """Write a file only if its text changed, so that Sphinx rebuilds no more than it must."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def below(text: str) -> str:
    """A text without its title, below a page's second level."""
    return text.partition("\n")[2].replace("\n## ", "\n### ")


def study_text(name: str) -> str:
    """All tables of a study."""
    study, folder = STUDIES[name]
    return study.markdown(study.read(folder))


def draw_study(folder: Path, name: str) -> None:
    """Draw the figures of a study: ``NAME.png``, or ``NAME_FIGURE.png`` if it has several."""
    study, records = STUDIES[name]
    data = study.read(records)
    for figure, draw in study.figures.items():
        own = figure.removeprefix(study.name).removeprefix(f"{name}_")
        save_png(draw(data, False), folder / f"{name}{own}.png")


def api_page() -> str:
    """The API reference: every public name of ``rap_env``, with its docstring."""
    parts = []
    for name in sorted(rap_env.__all__, key=str.lower):
        public = getattr(rap_env, name)
        if inspect.isclass(public):
            directive = f".. autoclass:: rap_env.{name}\n   :members:\n"
            if name.endswith("Env"):  # what the versions share is in base classes
                directive += "   :inherited-members: Env, VectorEnv\n"
        elif inspect.isfunction(public):
            directive = f".. autofunction:: rap_env.{name}\n"
        else:
            continue
        parts.append(f"## {name}\n\n```{{eval-rst}}\n{directive}```\n")
    return "\n".join(parts)


def command_reference() -> str:
    """The help of ``rap`` and of each of its commands."""
    top = click.Context(cli, info_name="rap", max_content_width=92)
    contexts = [top]
    for name in sorted(cli.commands):
        contexts.append(
            click.Context(cli.commands[name], parent=top, info_name=name, max_content_width=92)
        )
    return "\n".join(
        f"## {context.command_path}\n\n```text\n{context.command.get_help(context)}\n```\n"
        for context in contexts
    )


def main() -> None:
    """Write everything to ``docs/_generated``, and the README's table with its figure."""
    from readme_results import decision_cost, update_readme

    docs = Path(__file__).resolve().parent
    write_all(docs)
    for path, text in committed_pages(docs).items():
        write(path, text)
    shutil.copy(docs / "_generated" / LADDER_FIGURE, docs / "images" / LADDER_FIGURE)
    save_png(decision_cost(False), docs / "images" / "decision_cost.png")
    update_readme(ROOT / "README.md")


if __name__ == "__main__":
    main()
