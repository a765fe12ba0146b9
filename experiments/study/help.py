"""What ``--help`` of a program shows: the settings that it reads; and guesses of misspelt keys."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from itertools import accumulate, chain
from typing import Any

import yaml

from experiments.config import Config
from experiments.study.run_folder import flatten
from rap_env.specs import settings_of

MODEL = ("model", "scoring", "calibration", "importance", "store", "threads")
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
    **dict.fromkeys(("ladder", "equal_bytes"), (*MODEL, "ladder", "evaluate.text")),
    "level_costs_by_model": (*MODEL, "evaluate.text"),
    "replay": ("model", "store", "threads", "replay", "budget"),
    "cgroup": ("model.name", "cgroup"),
    "texts": (*MODEL, "texts", "env"),
}  # fmt: skip
"""Sections and settings of each program beside the first four; a program that is not listed reads
those of a model and the section of its own name."""

_WIDTH, _LONGEST_VALUE = 120, 80
_EXPLAINED = (
    "Each setting is explained beside its default in experiments/config, options such as\n"
    "agent=dqn in conf/agent and conf/choices.yaml. docs/training.md has examples."
)


def read_by(program: str) -> tuple[str, ...]:
    """Return the sections and settings that a program reads."""
    return ("name", "runs_dir", "progress", "seed", *READS.get(program, (*MODEL, program)))


def help_text(
    names: Sequence[str], values: Mapping[str, Any], groups: Mapping[str, list[str]]
) -> str:
    """Return the options of groups, and a line for each setting with its value.

    Args:
        names: The sections and settings to show.
        values: All settings with their values.
        groups: The options of each group; groups of other sections are left out.
    """
    chosen = [f"{group}={'|'.join(groups[group])}" for group in groups if group in names]
    text = " ".join([*chosen, "experiment=NAME (a file of conf/experiment)"])
    lines = [textwrap.fill(text, _WIDTH, break_on_hyphens=False), ""]
    for name in names:
        shown: Any = values
        for part in name.split("."):
            shown = shown[part]
        if isinstance(shown, Mapping) and "." not in name:
            shown = {f"{name}.{key}": value for key, value in shown.items()}
        else:
            shown = {name: shown}
        lines += [f"  {key}={_short(value)}{_choices(key)}" for key, value in shown.items()]
    return "\n".join([*lines, "", _EXPLAINED])


def _choices(name: str) -> str:
    """The names that a setting may be, such as ``"   (gsi|one_shot|none)"``."""
    section: Any = Config
    *path, last = name.split(".")
    for part in path:
        section = settings_of(section)[part].types[0]
    is_section = isinstance(section, type) and is_dataclass(section)
    text = "|".join(settings_of(section)[last].choices) if is_section else ""
    return f"   ({text})" if 0 < len(text) <= _LONGEST_VALUE else ""


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{...}" if value else "{}"
    text = yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n")
    text = text.replace("'", "")
    return textwrap.shorten(text, _LONGEST_VALUE, placeholder=" ...", break_on_hyphens=False)


def guess(key: str, values: dict[str, Any], groups: Iterable[str]) -> str:
    """Return one sentence about a setting that does not exist, with the nearest name."""
    paths = (accumulate(name.split("."), "{}.{}".format) for name in flatten(values))
    known = [*groups, *values, *chain.from_iterable(paths)]
    near = difflib.get_close_matches(key, known, n=1) or [
        name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]
    ]
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"There is no setting {key!r}.{hint} --help lists the settings of a program."
