"""Generates what the documentation does not type: result tables, environment pages, pictures.

``python docs/generate.py`` writes ``docs/_generated`` and the results of README.md; `docs/conf.py`
writes the former at each build. All numbers come from the committed records in ``results/``.
"""

from __future__ import annotations

import inspect
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from engine_tables import agreement_markdown, features_markdown
from plan_tables import (
    PLAN_COMPARISONS,
    RANKED,
    SEARCHES,
    TRANSFERS,
    agents_markdown,
    bold_title,
    plan_tables,
    ranked_markdown,
    search_markdown,
    shipped_markdown,
    stubs_markdown,
    tasks_markdown,
    transfer_markdown,
)
from readme_results import update_readme
from record_texts import (
    LONG_CONTEXTS,
    REPLAYS,
    RESULTS,
    ROOT,
    comparison_markdown,
    repair_markdown,
    replay_markdown,
    write,
)
from server_tables import load_generator_markdown, server_replay_markdown
from soak_tables import floor_table, soak_table

COMPARISONS = (
    *PLAN_COMPARISONS,
    "learning",
    "learning_scratch",
    "evolution",
    "small_unequal",
    "small_uniform",
    "transfer",
    "learning_library",
    "seeds",
)
"""Folders of ``results/`` with a comparison of methods."""

ENVIRONMENTS = {"v0": "RAPPruneEnv", "v1": "RAPPruneV1Env"}
"""The class of each version of the environment."""

LADDER_FIGURE = "loss_against_bytes.png"


def write_all(docs: Path) -> None:
    """Write every generated file.

    Args:
        docs: The folder of the documentation's sources.
    """
    folder = docs / "_generated"
    folder.mkdir(exist_ok=True)
    for name in COMPARISONS:
        text = comparison_markdown(name)
        write_details(docs, name, text)
        shown = plan_tables(text) if name in PLAN_COMPARISONS else first_tables(text)
        write(folder / f"{name}.md", shown)
    for name in TRANSFERS:
        text = transfer_markdown(RESULTS, name)
        write_details(docs, name, text)
        write(folder / f"{name}.md", plan_tables(text))
    write(folder / "tight_stubs.md", stubs_markdown(RESULTS))
    for comparison, ranked in RANKED.items():
        write(folder / f"{ranked}.md", ranked_markdown(RESULTS, comparison))
    write(folder / "tight_shipped.md", shipped_markdown(RESULTS))
    for name, search in SEARCHES.items():
        write(folder / f"{name}.md", search_markdown(RESULTS, search))
    write(folder / "tight_tasks.md", tasks_markdown(RESULTS))
    write(folder / "floor_tasks.md", tasks_markdown(RESULTS, "floor_tasks"))
    write(folder / "tight_agents.md", agents_markdown(RESULTS))
    write(folder / "ablation.md", ablation_table())
    for name in REPLAYS:
        write(folder / f"{name}.md", replay_markdown(name))
        draw_replay(folder, name)
    write_repair(docs)
    write(folder / "ladder.md", ladder_markdown())
    draw_ladder(folder)
    write_long_context(docs)
    write_texts(folder)
    write_prompts(folder)
    write_learning_curves(folder)
    write(folder / "leaderboard.md", leaderboard_markdown())
    write(folder / "soak.md", soak_table(RESULTS))
    write(folder / "soak_floor.md", floor_table(RESULTS))
    write(folder / "server_replay.md", server_replay_markdown(RESULTS))
    write(folder / "load_generator.md", load_generator_markdown(RESULTS))
    write(folder / "benchmarks.md", benchmarks_table())
    write(folder / "engine_features.md", features_markdown(RESULTS))
    write(folder / "engines.md", agreement_markdown(RESULTS))
    write(folder / "results_readme.md", (RESULTS / "README.md").read_text(encoding="utf-8"))
    for version, name in ENVIRONMENTS.items():
        write(folder / f"environment_{version}.md", environment_page(version, name))
    write(folder / "commands.md", command_reference())
    write(folder / "api.md", api_page())
    from architecture import draw_architecture

    draw_architecture(folder / "architecture.svg")


def draw_replay(folder: Path, name: str) -> None:
    """Draw memory and latency of a replay."""
    from experiments.replay.study import STUDY
    from experiments.study.figures import save_png

    rows = STUDY.read(REPLAYS[name])
    for figure, draw in STUDY.figures.items():
        save_png(draw(rows, False), folder / f"{name}_{figure.removeprefix('replay_')}.png")


def write_details(docs: Path, name: str, text: str) -> None:
    """Write the page with all tables of one part of the results, which its page links to."""
    details = docs / "results" / "details"
    details.mkdir(exist_ok=True)
    write(details / f"{name}.md", f"---\norphan: true\n---\n\n{text.strip()}\n")


def first_tables(text: str) -> str:
    """The summary and the first verdict table of a comparison, without the page's title."""
    _, *sections = text.split("\n## ")
    summary = text.split("\n## ")[0].partition("\n")[2].strip()
    shown = [summary]
    if sections and " minus each other method" in sections[0].partition("\n")[0]:
        shown.append(bold_title(sections[0]))
    return "\n\n".join(shown) + "\n"


def ablation_table() -> str:
    """The objective of each ablation: mean ΔNLL of the policy alone on the calibration text."""
    rows = []
    for path in sorted((RESULTS / "ablation" / "train").glob("*/run.json")):
        facts = json.loads(path.read_text(encoding="utf-8"))
        rows.append((float(facts["objective"]), path.parent.name))
    head = "| Training run | ΔNLL on calibration text |\n| :--- | ---: |\n"
    return head + "\n".join(f"| `{name}` | {value:.3f} |" for value, name in sorted(rows)) + "\n"


def write_repair(docs: Path) -> None:
    """Write the tables of the repair experiment: the main ones, and a page with all."""
    text = repair_markdown()
    write_details(docs, "repair", text)
    write(docs / "_generated" / "repair.md", plan_tables(text, shown=("Targets",)))


def ladder_markdown() -> str:
    """The tables of the ladder, below the page's first level."""
    from experiments.ladder.rows import read_ladder
    from experiments.ladder.tables import ladder_markdown as tables

    text = tables(read_ladder(RESULTS / "ladder")).partition("\n")[2]
    return text.replace("\n## ", "\n### ") or "No records.\n"


def draw_ladder(folder: Path) -> None:
    """Draw loss against bytes, and write the text that shows the picture."""
    from experiments.ladder.figures import loss_against_bytes
    from experiments.ladder.rows import read_ladder
    from experiments.study.figures import PNG_DPI, style

    found = read_ladder(RESULTS / "ladder")
    shown = "No records.\n"
    if found.plans:
        figure = loss_against_bytes(found, narrow=False)
        with style():
            figure.savefig(folder / LADDER_FIGURE, dpi=PNG_DPI)
        shown = f"```{{image}} _generated/{LADDER_FIGURE}\n:alt: Loss against bytes\n```\n"
    write(folder / "ladder_figure.md", shown)


def write_long_context(docs: Path) -> None:
    """Write the pictures and tables of recall and loss over the length: the main ones, and all."""
    from experiments.long_context.study import STUDY
    from experiments.study.figures import save_png

    folder = docs / "_generated"
    for name, records in LONG_CONTEXTS.items():
        data = STUDY.read(records)
        save_png(STUDY.figures["long_context"](data, False), folder / f"{name}.png")
        figure = (
            f"```{{image}} ../_generated/{name}.png\n"
            ":alt: Right answers, loss by position and loss of answers over the length\n```\n"
        )
        text = STUDY.markdown(data)
        write_details(docs, name, text)
        write(folder / f"{name}.md", figure + text.split("\n## ")[1].partition("\n")[2])


def write_texts(folder: Path) -> None:
    """Write the tables and the picture of how plans depend on the calibration text."""
    from experiments.studies.texts import STUDY
    from experiments.study.figures import save_png
    from experiments.study.tables import markdown

    data = STUDY.read(RESULTS / "texts")
    save_png(STUDY.figures["texts"](data, False), folder / "texts.png")
    figure = (
        "```{image} ../_generated/texts.png\n"
        ":alt: ΔNLL of plans by the text that they were chosen on and judged on\n```\n"
    )
    write(folder / "texts.md", STUDY.markdown(data).partition("\n")[2].strip() + "\n\n" + figure)
    sizes = STUDY.read(RESULTS / "texts_sizes")
    write(folder / "texts_sizes.md", markdown(sizes.size_table()))


def write_prompts(folder: Path) -> None:
    """Write the tables of policies that see the prompt."""
    from experiments.studies.prompts import STUDY

    text = STUDY.markdown(STUDY.read(RESULTS / "prompts"))
    write(folder / "prompts.md", text.partition("\n")[2].strip() + "\n")


def write_learning_curves(folder: Path) -> None:
    """Draw the learning curves of the examples, and write the text that shows them."""
    from experiments.learning_curves import learning_curves, read_curves
    from experiments.study.figures import save_png

    found, shown = read_curves(RESULTS / "examples"), "No records.\n"
    if found:
        save_png(learning_curves(found), folder / "learning_curves.png")
        shown = (
            "```{image} _generated/learning_curves.png\n"
            ":alt: Mean ΔNLL of the trainers in examples/ over the steps of their training\n```\n"
        )
    write(folder / "learning_curves.md", shown)


def leaderboard_markdown() -> str:
    """The published entries of each comparison, the best on held-out text first."""
    from experiments.leaderboard import predicted_test_delta_nll, rank_correlation
    from experiments.study.tables import markdown, seconds
    from rap_env.leaderboard.entries import published_entries
    from rap_env.leaderboard.tasks import pinned_tasks

    parts = []
    for comparison in dict.fromkeys(task.comparison for task in pinned_tasks().values()):
        entries = published_entries(comparison)
        entries = sorted(entries, key=lambda entry: float(entry.delta_nll("test").mean()))
        predicted = predicted_test_delta_nll(comparison)
        head = [
            "Method", "ΔNLL, test", "Predicted", "ΔNLL, calibration", "Seeds", "Evaluations",
            "Time",
        ]  # fmt: skip
        rows = [
            [
                entry.name,
                f"{entry.delta_nll('test').mean():.3f}",
                f"{predicted[entry.name]:.3f}",
                f"{entry.delta_nll('calibration').mean():.3f}",
                str(len(entry.runs)),
                f"{entry.evaluations:,.0f} + {entry.setup_evaluations:,}",
                seconds(entry.decision_s),
            ]
            for entry in entries
        ]
        agreement = (
            f"Rank correlation of *Predicted* and *ΔNLL, test* over the {len(entries)} methods: "
            f"{rank_correlation(comparison, predicted):.2f}."
        )
        parts.append(f"### {comparison}\n\n{markdown((head, rows))}\n\n{agreement}")
    return "\n\n".join(parts) + "\n"


def benchmarks_table() -> str:
    """The table of all benchmarks."""
    from benchmarks.record import markdown, read_records

    return markdown(read_records()) + "\n"


def environment_page(version: str, name: str) -> str:
    """An environment's page, from its class docstring as Gymnasium makes its own."""
    import rap_env

    text = inspect.cleandoc(getattr(rap_env, name).__doc__ or "")
    return f"# RAPPrune-{version}\n\n{text}\n"


def api_page() -> str:
    """The API reference: every public name of ``rap_env``, with its docstring."""
    import rap_env

    parts = []
    for name in sorted(rap_env.__all__, key=str.lower):
        thing = getattr(rap_env, name)
        if inspect.isclass(thing):
            directive = f".. autoclass:: rap_env.{name}\n   :members:\n"
            if name.endswith("Env"):  # what the versions share is in base classes
                directive += "   :inherited-members: Env, VectorEnv\n"
        elif inspect.isfunction(thing):
            directive = f".. autofunction:: rap_env.{name}\n"
        else:
            continue
        parts.append(f"## {name}\n\n```{{eval-rst}}\n{directive}```\n")
    return "\n".join(parts)


def command_reference() -> str:
    """The help of ``rap`` and of each of its commands."""
    import click

    from rap_env.cli import cli

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


def main(arguments: list[str]) -> Any:
    """Write everything to ``docs/_generated``, and the README's results with their picture."""
    docs = Path(arguments[1]) if len(arguments) > 1 else Path(__file__).resolve().parent
    write_all(docs)
    shutil.copy(docs / "_generated" / LADDER_FIGURE, ROOT / "docs" / "images" / LADDER_FIGURE)
    update_readme()


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT)]
    main(sys.argv)
