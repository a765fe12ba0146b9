"""What ``--help`` of a program shows: the settings that it reads; and guesses of misspelt keys."""

from __future__ import annotations

import ast
import difflib
import inspect
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import pairwise
from typing import Any, get_type_hints

import yaml

from experiments.config import Config, plain

MODEL = ("model", "scoring", "calibration", "importance", "repair", "store", "threads")
"""What a program reads that measures on a model."""

READS: dict[str, tuple[str, ...]] = {
    "train": (*MODEL, "env", "workload", "reward", "agent", "warm_start", "score_model", "logger",
              "frontier", "evaluate.requests", "evaluate.budgets", "evaluate.pinned",
              "evaluate.selection"),
    "evaluate": (*MODEL, "env", "evaluate", "logger"),
    "profile": (*MODEL, "env", "workload", "frontier", "logger"),
    "demo": (*MODEL, "demo", "env", "workload", "reward", "agent.total_timesteps", "frontier",
             "evaluate", "report"),
    "report": ("report",),
    "export_scores": (*MODEL, "export", "env.id"),
    "repair": (*MODEL, "stubs", "evaluate.tasks"),
    **dict.fromkeys(("ladder", "llama_cpp", "outside"), (*MODEL, "ladder", "evaluate.text")),
    "level_costs_by_model": (*MODEL, "evaluate.text"),
    "replay": (*MODEL, "replay", "budget"),
    "cgroup": ("model.name", "cgroup"),
    "texts": (*MODEL, "texts", "env", "kinds"),
    "prompts": (*MODEL, "prompts", "texts"),
}  # fmt: skip
"""Sections and settings of each program beside the first four; a program that is not listed reads
those of a model and the section of its own name."""

_WIDTH = 120


def settings_of(program: str) -> tuple[str, ...]:
    """Return the sections and settings that a program reads."""
    return ("name", "runs_dir", "progress", "seed", *READS.get(program, (*MODEL, program)))


def help_text(
    names: Sequence[str], schema: type, values: Mapping[str, Any], groups: Mapping[str, list[str]]
) -> str:
    """Return the options of groups, and a line for each setting with its value and what it is.

    Args:
        names: The sections and settings to show.
        schema: The class of all settings.
        values: All settings with their values.
        groups: The options of each group; groups of other sections are left out.
    """
    words, lines = dict(described(schema)), []
    for name in names:
        shown: Any = values
        for part in name.split("."):
            shown = shown[part]
        whole = "." in name or not isinstance(shown, Mapping)
        for key, value in {name: shown}.items() if whole else shown.items():
            full = key if whole else f"{name}.{key}"
            about = words.get(full) or (words.get(name, "") if key == "name" else "")
            head = f"  {f'{full}={_short(value)}':<36} "
            lines.append(head.rstrip() if not about else head + _cut(about, _WIDTH - len(head)))
    chosen = [f"{group}={'|'.join(groups[group])}" for group in groups if group in names]
    text = " ".join([*chosen, "experiment=NAME (a file of conf/experiment)"])
    options = textwrap.fill(text, _WIDTH, break_on_hyphens=False)
    return "\n".join([*([options, ""] if groups else []), *lines])


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{...}" if value else "{}"
    text = yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n")
    return _cut(text.replace("'", ""), 40)


def _cut(text: str, width: int) -> str:
    return textwrap.shorten(text, width, placeholder=" ...", break_on_hyphens=False)


def described(schema: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield each setting with the sentence that its class or its section's mapping says of it."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(schema)))
    (definition,) = (node for node in tree.body if isinstance(node, ast.ClassDef))
    for before, after in pairwise(definition.body):
        if isinstance(before, ast.AnnAssign) and isinstance(after, ast.Expr):
            yield f"{prefix}{ast.unparse(before.target)}", _sentence(ast.literal_eval(after.value))
    hints = get_type_hints(schema)
    for field in fields(schema):
        if is_dataclass(kind := hints[field.name]) and isinstance(kind, type):
            yield from described(kind, f"{prefix}{field.name}.")
    if schema is Config:
        yield from _described_mappings(inspect.getsource(plain))


def _described_mappings(source: str) -> Iterator[tuple[str, str]]:
    """Yield the settings of the plain sections, with the comment above or beside each."""
    section, comment = "", ""
    for line in source.splitlines():
        if start := re.match(r'    "(\w+)": \{$', line):
            section, comment = start[1], ""
        elif setting := re.match(r'\s+"(\w+)": Setting\(.*?\)?,(?:\s+# (.*))?$', line):
            yield f"{section}.{setting[1]}", _sentence(setting[2] or comment)
            comment = ""
        elif words := re.match(r"\s+# (.*)", line):
            comment = f"{comment} {words[1]}"


def _sentence(text: str) -> str:
    """The first sentence of a description, in one line."""
    return re.split(r"(?<=\w)\. |\.$", " ".join(text.replace("`", "").split()))[0]


def guess(key: str, values: Mapping[str, Any], groups: Iterable[str]) -> str:
    """Return one sentence about a setting that does not exist, with the nearest name."""
    known = [*groups, *_names(values)]
    near = difflib.get_close_matches(key, known, n=1) or [
        name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]
    ]
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"There is no setting {key!r}.{hint} --help lists the settings of a program."


def _names(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _names(value, f"{prefix}{key}.")
