"""Generates what the documentation does not type: result tables, environment pages, pictures.

``python docs/generate.py`` writes ``docs/_generated`` and the results of README.md; `docs/conf.py`
writes the former at each build. All numbers come from the committed records in ``results/``.
"""

from __future__ import annotations

import inspect
import json
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any

from engine_tables import agreement_markdown, features_markdown, serving_markdown
from plan_tables import (
    PLAN_COMPARISONS,
    PLANS,
    agents_markdown,
    bold_title,
    greedy_markdown,
    plan_tables,
    ranked_markdown,
    searches_markdown,
    shipped_markdown,
    stubs_markdown,
    tasks_markdown,
)
from server_tables import load_generator_markdown, server_replay_markdown
from soak_tables import floor_table, soak_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"

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

README_BEGIN, README_END = "<!-- results: begin -->\n", "<!-- results: end -->\n"
"""Between these lines, README.md holds what `readme_results` gives."""

LADDER_FIGURE = "loss_against_bytes.png"

REPLAYS = {"replay": RESULTS / "replay" / "replay", "replay_ladder": RESULTS / "ladder" / "replay"}
"""Folders of the replays, by the name under which the pages include them."""

REPLAY_FIGURES = ("memory", "latency")

LONG_CONTEXTS = {
    "long_context": RESULTS / "long_context",
    "tight_recall": RESULTS / "tight_recall" / "long_context",
}
"""Folders of records over the length of the context, by the name of their page."""

RECALL_BUDGET, RECALL_TOKENS = "30 %", 2048
"""The budget and length at which the README compares policies by their recall."""


def write_all(docs: Path) -> None:
    """Write every generated file.

    Args:
        docs: The folder of the documentation's sources.
    """
    folder = docs / "_generated"
    folder.mkdir(exist_ok=True)
    details = docs / "results" / "details"
    details.mkdir(exist_ok=True)
    for name in COMPARISONS:
        text = comparison_markdown(name)
        _write(details / f"{name}.md", f"---\norphan: true\n---\n\n{text}\n")
        shown = plan_tables(text) if name in PLAN_COMPARISONS else first_tables(text)
        _write(folder / f"{name}.md", shown)
    _write(folder / "tight_stubs.md", stubs_markdown(RESULTS))
    _write(folder / "tight_ranked.md", ranked_markdown(RESULTS))
    _write(folder / "tight_shipped.md", shipped_markdown(RESULTS))
    _write(folder / "tight_searches.md", searches_markdown(RESULTS))
    _write(folder / "tight_greedy.md", greedy_markdown(RESULTS))
    _write(folder / "tight_tasks.md", tasks_markdown(RESULTS))
    _write(folder / "floor_tasks.md", tasks_markdown(RESULTS, "floor_tasks"))
    _write(folder / "tight_agents.md", agents_markdown(RESULTS))
    _write(folder / "ablation.md", ablation_table())
    for name in REPLAYS:
        _write(folder / f"{name}.md", replay_markdown(name))
        for figure in REPLAY_FIGURES:
            drawn = REPLAYS[name] / "figures" / f"replay_{figure}.png"
            shutil.copy(drawn, folder / f"{name}_{figure}.png")
    _write(folder / "repair.md", repair_markdown())
    _write(folder / "ladder.md", ladder_markdown())
    draw_ladder(folder)
    write_long_context(folder)
    write_texts(folder)
    write_learning_curves(folder)
    _write(folder / "leaderboard.md", leaderboard_markdown())
    _write(folder / "soak.md", soak_table(RESULTS))
    _write(folder / "soak_floor.md", floor_table(RESULTS))
    _write(folder / "server_replay.md", server_replay_markdown(RESULTS))
    _write(folder / "load_generator.md", load_generator_markdown(RESULTS))
    _write(folder / "benchmarks.md", benchmarks_table())
    _write(folder / "engine_features.md", features_markdown(RESULTS))
    _write(folder / "engines.md", agreement_markdown(RESULTS))
    _write(folder / "engines_serving.md", serving_markdown(RESULTS))
    _write(folder / "results_readme.md", (RESULTS / "README.md").read_text(encoding="utf-8"))
    for version, name in ENVIRONMENTS.items():
        _write(folder / f"environment_{version}.md", environment_page(version, name))
    _write(folder / "commands.md", command_reference())
    _write(folder / "api.md", api_page())
    from architecture import draw_architecture

    draw_architecture(folder / "architecture.svg")


def comparison_markdown(name: str) -> str:
    """All tables of one comparison, as ``python -m experiments.compare`` prints them."""
    from experiments.compare import compare
    from experiments.config.evaluation import CompareConfig

    return compare(CompareConfig(runs=str(RESULTS / name), format="markdown"))


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


def replay_markdown(name: str) -> str:
    """The tables of a replay, below the page's second level."""
    from experiments.replay.records import ReplayRow
    from experiments.replay.tables import replay_markdown as tables

    rows = ReplayRow.read(REPLAYS[name] / "replay.jsonl")
    return tables(rows).partition("\n")[2].replace("\n## ", "\n### ")


def repair_markdown() -> str:
    """The tables of the repair experiment, below the page's first level."""
    from experiments.comparison.loading import gather
    from experiments.repair.tables import repair_markdown as tables

    data = gather(RESULTS / "repair")
    assert data.repair is not None
    return tables(data.repair, data.repair_orders).partition("\n")[2]


def ladder_markdown() -> str:
    """The tables of the ladder, below the page's first level."""
    from experiments.ladder.summaries import read_ladder
    from experiments.ladder.tables import ladder_markdown as tables

    text = tables(read_ladder(RESULTS / "ladder")).partition("\n")[2]
    return text.replace("\n## ", "\n### ") or "No records.\n"


def draw_ladder(folder: Path) -> None:
    """Draw loss against bytes, and write the text that shows the picture."""
    from experiments.comparison.plotting import PNG_DPI, style
    from experiments.ladder.figures import loss_against_bytes
    from experiments.ladder.summaries import read_ladder

    found = read_ladder(RESULTS / "ladder")
    shown = "No records.\n"
    if found.ladder:
        figure = loss_against_bytes(found.ladder, found.llama_cpp, narrow=False)
        with style():
            figure.savefig(folder / LADDER_FIGURE, dpi=PNG_DPI)
        shown = f"```{{image}} _generated/{LADDER_FIGURE}\n:alt: Loss against bytes\n```\n"
    _write(folder / "ladder_figure.md", shown)


def write_long_context(folder: Path) -> None:
    """Write the tables and the pictures of recall and loss over the length of the context."""
    from experiments.long_context.figures import save_figure
    from experiments.long_context.tables import Curves, long_context_markdown

    for name, records in LONG_CONTEXTS.items():
        found, shown = Curves.read(records), "No records.\n"
        if found:
            save_figure(found, folder / f"{name}.png")
            figure = (
                f"```{{image}} ../_generated/{name}.png\n"
                ":alt: Right answers, loss by position and loss of answers over the length\n```\n"
            )
            text = long_context_markdown(found)
            if name != "long_context":  # the page has all tables of one comparison only
                text = text.split("\n## ")[1]
            shown = figure + text.partition("\n")[2]
        _write(folder / f"{name}.md", shown)


def write_texts(folder: Path) -> None:
    """Write the tables and the picture of how plans depend on the calibration text."""
    from experiments.studies.tables import TextStudy, save_figure, texts_markdown

    found = TextStudy.read(RESULTS / "texts")
    save_figure(found, folder / "texts.png")
    figure = (
        "```{image} ../_generated/texts.png\n"
        ":alt: ΔNLL of plans by the text that they were chosen on and judged on\n```\n"
    )
    _write(folder / "texts.md", texts_markdown(found).partition("\n")[2].strip() + "\n\n" + figure)


def write_learning_curves(folder: Path) -> None:
    """Draw the learning curves of the examples, and write the text that shows them."""
    from experiments.learning_curves.figures import read_curves, save_figure

    found, shown = read_curves(RESULTS / "examples"), "No records.\n"
    if found:
        save_figure(found, folder / "learning_curves.png")
        shown = (
            "```{image} _generated/learning_curves.png\n"
            ":alt: Mean ΔNLL of the trainers in examples/ over the steps of their training\n```\n"
        )
    _write(folder / "learning_curves.md", shown)


def ladder_results() -> list[str]:
    """The README's results of the ladder; empty without records."""
    from experiments.ladder.report import ladder_findings
    from experiments.ladder.summaries import read_ladder

    texts = ladder_findings(read_ladder(RESULTS / "ladder"))
    return [f"**Precision before removal**: {text[0].lower()}{text[1:]}" for text in texts]


def long_context_results() -> list[str]:
    """The README's results on recall over the context; empty without records."""
    from experiments.long_context.tables import Curves, long_context_findings

    texts = long_context_findings(Curves.read(RESULTS / "long_context"))
    kept = recall_policy_finding(Curves.read(LONG_CONTEXTS["tight_recall"]))
    return [
        f"**A lower loss is not better recall**: {text[0].lower()}{text[1:]}{kept}"
        for text in texts
    ]


def recall_policy_finding(found: Any) -> str:
    """What a policy that was trained for recall answers; empty without records."""
    from experiments.comparison.formatting import percent

    shares = {}
    for policy in ("rap", "rap-recall"):
        rows = found.facts(f"{policy} {RECALL_BUDGET}", RECALL_TOKENS) if found else []
        if not rows:
            return ""
        right = sum(sum(row.right) for row in rows)
        shares[policy] = right / sum(row.questions for row in rows)
    return (
        f" At {RECALL_BUDGET} of the native peak, a policy trained on text with questions "
        f"answers {percent(shares['rap-recall'], 0)} of those on {RECALL_TOKENS:,} tokens, one "
        f"trained on the loss alone {percent(shares['rap'], 0)}."
    )


def tables_of(text: str) -> list[dict[str, list[str]]]:
    """The tables of a Markdown text: the cells of each row by its first cell."""
    tables: list[dict[str, list[str]]] = []
    inside = False
    for line in text.splitlines():
        if line.startswith("| :--"):
            tables.append({})
            inside = True
        elif inside and line.startswith("|"):
            first, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            tables[-1].setdefault(first, cells)
        else:
            inside = False
    return tables


def readme_results() -> str:
    """The README's results, with every number taken from the records."""
    summary, verdicts, *_ = tables_of(comparison_markdown("learning"))
    unequal, unequal_verdicts, *_ = tables_of(comparison_markdown("small_unequal"))
    served, _, quality, *_ = tables_of(replay_markdown("replay"))
    repair = tables_of(repair_markdown())[0]
    policy, greedy = summary["RAP policy (5)"], summary["Greedy per byte"]
    targets = [
        target["reached"]
        for name in ("decide", "gsi", "step")
        for target in json.loads(
            (RESULTS / "benchmarks" / f"{name}-cpu.json").read_text(encoding="utf-8")
        )["targets"]
    ]
    decision_ms, _, _, lazy, *_, steps = targets
    results = (
        *ladder_results(),
        *plan_results(),
        *long_context_results(),
        "**Removing blocks alone, a policy loses less than a search for each request**: ΔNLL "
        f"{policy[0]}, greedy search per byte {greedy[0]} "
        f"({verdicts['Greedy per byte'][1]}). The search runs the model {greedy[2]} times per "
        "request, the policy not at all.",
        "**A lookup table does as well in a uniform model**: the frontier has "
        f"{summary['Frontier table'][0]}. Where the bytes of blocks differ, the policy has "
        f"{unequal['RAP policy (3)'][0]} and the frontier {unequal['Frontier table'][0]} "
        f"({unequal_verdicts['Frontier table'][1]}).",
        "**Serving within memory that moves**: policy and frontier serve "
        f"{served['RAP policy'][0]} of a replayed trace and exceed the budget in "
        f"{served['RAP policy'][6]} steps, with ΔNLL {quality['RAP policy'][0]} and "
        f"{quality['Frontier table'][0]}. The dense model serves {served['Dense'][0]} and exceeds "
        f"it in {served['Dense'][6]} steps; the largest static mask that always fits one row has "
        f"ΔNLL {quality['Static, lean'][0]}.",
        "**Stubs recover much of the ΔNLL**: on text of other kinds, a library fitted once leaves "
        f"{repair['Library'][3]} of ΔNLL, a distilled one {repair['Distilled library'][3]}. "
        "Accuracies on five small tasks hardly move.",
        f"**It is fast**: a decision takes {decision_ms:.1f} ms (99th percentile, without torch), "
        f"64 sub-environments take {steps:,.0f} steps a second on known scores, and lazy GSI is "
        f"{lazy:.1f} times as fast as the naive loop.",
    )
    lines = [
        textwrap.fill(text, 104, initial_indent=f"{number}. ", subsequent_indent="   ")
        for number, text in enumerate(results, start=1)
    ]
    return "\n".join(lines) + "\n"


def plan_results() -> list[str]:
    """What the README says of plans at tight budgets."""
    summary, verdicts, *_ = tables_of(comparison_markdown(PLANS))
    policy = next(name for name in summary if name.startswith("RAP policy"))
    seeds = policy.partition("(")[2].rstrip(")") or "1"
    stubs = tables_of(stubs_markdown(RESULTS))[0]
    repaired = next(name for name in stubs if name.startswith("RAP policy ("))
    return [
        "**At budgets where no choice is free, a policy over levels loses less than what one would "
        f"do instead**: ΔNLL {summary[policy][0]} ({seeds} training seed{'s' * (seeds != '1')}), "
        f"the best uniform setting that fits {summary['Uniform settings'][0]} "
        f"({verdicts['Uniform settings'][1]}), the knapsack over levels {summary['Knapsack'][0]} "
        f"({verdicts['Knapsack'][1]}). A lookup in the table of measured plans, from which the "
        f"policy learned, has {summary['Frontier table'][0]}. With a stub in "
        "the place of each removed block (fitted to seven kinds of text, one of them other "
        "WikiText articles), stubs counted in the same budgets, the policy's ΔNLL is "
        f"{stubs[repaired][0]} and that of uniform settings {stubs['Uniform settings'][0]}."
    ]


def update_readme(path: Path = ROOT / "README.md") -> None:
    """Write `readme_results` into the README."""
    before, _, rest = path.read_text(encoding="utf-8").partition(README_BEGIN)
    after = rest.partition(README_END)[2]
    _write(path, f"{before}{README_BEGIN}{readme_results()}{README_END}{after}")


def leaderboard_markdown() -> str:
    """The published entries of each comparison, the best on held-out text first."""
    from experiments.comparison.formatting import markdown, seconds
    from experiments.leaderboard.table_fidelity import predicted_test_delta_nll, rank_correlation
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
    from benchmarks.table import markdown, read_records

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


def _write(path: Path, text: str) -> None:
    """Write a file only if its text changed, so that Sphinx rebuilds no more than it must."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def main(arguments: list[str]) -> Any:
    """Write everything to ``docs/_generated``, and the README's results with their picture."""
    docs = Path(arguments[1]) if len(arguments) > 1 else Path(__file__).resolve().parent
    write_all(docs)
    shutil.copy(docs / "_generated" / LADDER_FIGURE, ROOT / "docs" / "images" / LADDER_FIGURE)
    update_readme()


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT)]
    main(sys.argv)
