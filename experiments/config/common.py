"""What several sections are made of: texts, tasks, requests, and bounds."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from omegaconf import MISSING

from experiments.errors import ExperimentError

Cell = tuple[int, int, float]
"""Batch size, sequence length in tokens, budget as a fraction of the dense peak."""

_SHAPE = re.compile(r"(\d+)x(\d+)")

_CELL = re.compile(r"(\d+x\d+)@(0?\.\d+|1|1\.0)")


def at_least(section: str, least: float, **values: float | None) -> None:
    """Refuse values below `least`.

    Raises:
        ExperimentError: One is.
    """
    for name, value in values.items():
        if value is not None and value < least:
            raise ExperimentError(f"{section}.{name} must be at least {least}, not {value}.")


@dataclass
class TextConfig:
    """Text cut into windows."""

    source: str = MISSING
    """``self`` (the dense model writes it), a text or JSONL file, or a hub data set."""
    windows: int = 4
    window_tokens: int = 128
    seed: int = 0
    field: str = "text"
    """Field of a JSONL file or data set that holds the text."""

    def __post_init__(self) -> None:
        """Refuse windows that cannot be."""
        at_least("text", 1, windows=self.windows)
        at_least("text", 2, window_tokens=self.window_tokens)


def self_written() -> TextConfig:
    """Text by the dense model itself."""
    return TextConfig(source="self")


@dataclass
class TasksConfig:
    """lm-eval tasks; no names means none."""

    names: list[str] = field(default_factory=list)
    limit: int | None = None
    """Documents of each task; null for all."""
    data_root: str | None = None
    """Folder with local files of hub tasks, or null."""
    num_fewshot: int = 0

    def __post_init__(self) -> None:
        """Refuse impossible limits."""
        at_least("tasks", 1, limit=self.limit)
        at_least("tasks", 0, num_fewshot=self.num_fewshot)


def parse_shape(text: str) -> tuple[int, int]:
    """``"8x2048"`` as (8, 2048).

    Raises:
        ExperimentError: The text has another form.
    """
    match = _SHAPE.fullmatch(str(text).replace(" ", ""))
    if not match:
        raise ExperimentError(f"A request is BATCHxTOKENS, such as 8x2048; {text!r} is not.")
    return int(match[1]), int(match[2])


def parse_cell(text: str) -> tuple[int, int, float]:
    """``"8x2048@0.85"`` as (8, 2048, 0.85).

    Raises:
        ExperimentError: The text has another form, or the budget is no share of the dense peak.
    """
    match = _CELL.fullmatch(str(text).replace(" ", ""))
    if not match:
        raise ExperimentError(
            f"A cell is BATCHxTOKENS@BUDGET, such as 8x2048@0.85; {text!r} is not."
        )
    return (*parse_shape(match[1]), float(match[2]))
