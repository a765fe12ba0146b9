"""Generates what the documentation does not type: tables, environment pages, pictures.

``python docs/generate.py`` writes the tables into the pages, between their markers, and the
pictures of README.md; both are committed. `docs/conf.py` makes the rest at each build, into
``docs/_generated`` and ``docs/results/details``. All numbers come from the records in ``results/``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from typing import Any

import click
import record_tables
from readme_results import decision_cost, readme_results, table_speeds
from record_tables import (
    GEMMA,
    LOW_BITS,
    OUTSIDE,
    PLANS,
    RANKED,
    RESULTS,
    ROOT,
    SEARCHES,
    shown_tables,
)

import rap_env
from benchmarks.harness import committed_records, targets_table
from experiments import studies
from experiments.study.harness import (
    Published,
    Study,
    write_changed,
    write_pages,
)
from experiments.study.plotting import save_png
from rap_env.cli import cli

ENVIRONMENTS = {
    "environment": ("RAPPrune-v0", "RAPPruneEnv"),
    "environment_ladder": ("RAPLadder-v0", "RAPLadderEnv"),
}
"""The page of each environment, with its name and class."""

PLAN_COMPARISONS = (
    PLANS, LOW_BITS, record_tables.OWN_BUDGETS, GEMMA, record_tables.LOW_BITS_GEMMA, OUTSIDE
)  # fmt: skip
COMPARISONS = ("learning", "learning_scratch", "evolution", "seeds")
"""Folders of ``results/`` with a comparison of methods that choose masks."""
TRANSFERS = ("tight_transfer_gemma", "tight_transfer_smollm2")
"""Comparisons with policies of the other model."""


def found_studies() -> Iterator[tuple[Study[Any], Published]]:
    """Yield the studies of all modules of `experiments.studies`, with their committed records."""
    for module in walk_packages(studies.__path__, f"{studies.__name__}."):
        if not module.name.endswith(".__main__"):
            for study in vars(import_module(module.name)).values():
                if isinstance(study, Study):
                    yield from ((study, published) for published in study.published)


STUDIES = {published.name: (study, published) for study, published in found_studies()}
"""Each study with one of its committed records, by the name of their markers."""


@cache
def study_text(name: str) -> str:
    """All tables of a study."""
    study, published = STUDIES[name]
    return study.markdown(study.read(published.folder))


def part_of(name: str, shown: Callable[[str], str]) -> str:
    """What a page shows of the tables in `FULL`."""
    return shown(FULL[name]())


def environment_text(kind: str) -> str:
    """The docstring of an environment, by the name of its class."""
    return inspect.cleandoc(getattr(rap_env, kind).__doc__ or "")


FULL: dict[str, Callable[[], str]] = {
    **{
        name: partial(record_tables.comparison_text, name)
        for name in (*PLAN_COMPARISONS, *COMPARISONS)
    },
    **{name: partial(record_tables.transfer_text, name) for name in TRANSFERS},
    **{name: partial(study_text, name) for name in STUDIES},
}
"""All tables of a comparison or study by its name: a page of ``docs/results/details`` each."""

TABLES: dict[str, Callable[[], str]] = {
    "results": readme_results,
    "speeds": table_speeds,
    **{name: partial(part_of, name, shown_tables) for name in (*PLAN_COMPARISONS, *TRANSFERS)},
    **{name: partial(part_of, name, record_tables.first_tables) for name in COMPARISONS},
    **{name: partial(part_of, name, published.shown) for name, (_, published) in STUDIES.items()},
    **{ranked: partial(record_tables.ranked_text, name) for name, ranked in RANKED.items()},
    "tight_packaged": record_tables.packaged_text,
    **{name: partial(record_tables.search_text, *search) for name, search in SEARCHES.items()},
    **{
        n: partial(record_tables.tasks_text, n)
        for n in ("tight_tasks", "floor_tasks", "few_bits_tasks")
    },
    "tight_agents": record_tables.agents_text,
    "ablation": record_tables.ablation_text,
    "entries": record_tables.leaderboard_text,
    **{page: partial(environment_text, kind) for page, (_, kind) in ENVIRONMENTS.items()},
    "load_generator": record_tables.load_generator_text,
    "benchmarks": lambda: targets_table(committed_records()),
}
"""What stands between ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->`` of a page, by name."""


def write_all(docs: Path) -> None:
    """Write every generated file that is not committed.

    Args:
        docs: The folder of the documentation's sources.
    """
    folder, details = docs / "_generated", docs / "results" / "details"
    for new in (folder, details):
        new.mkdir(exist_ok=True)
    for name, full_text in FULL.items():
        write_changed(details / f"{name}.md", f"---\norphan: true\n---\n\n{full_text().strip()}\n")
    records = (RESULTS / "README.md").read_text(encoding="utf-8")
    write_changed(folder / "results_readme.md", records)
    write_changed(folder / "commands.md", command_reference())
    write_changed(folder / "api.md", api_page())


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
    """Write the committed tables and pictures."""
    write_pages(TABLES)
    save_png(decision_cost(), ROOT / "docs" / "images" / "decision_cost.png")


if __name__ == "__main__":
    main()
