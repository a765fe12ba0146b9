"""Parts that several sections share: texts, tasks, requests and validation."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field

from omegaconf import MISSING

from experiments.errors import ExperimentError
from rap_env.errors import UnknownNameError

Cell = tuple[int, int, float]
"""Batch size, sequence length in tokens, budget as a fraction of the dense peak."""

_SHAPE = re.compile(r"(\d+)x(\d+)")
_CELL = re.compile(r"(\d+x\d+)@(0?\.\d+|1|1\.0)")


def at_least(section: str, least: float, **values: float | None) -> None:
    """Check that values are None or not below `least`.

    Raises:
        ExperimentError: A value is below.
    """
    for name, value in values.items():
        if value is not None and value < least:
            raise ExperimentError(f"{section}.{name} must be at least {least}, not {value}.")


def above_zero(section: str, **values: float | None) -> None:
    """Check that values are None or above 0.

    Raises:
        ExperimentError: A value is 0 or below.
    """
    for name, value in values.items():
        if value is not None and not value > 0:
            raise ExperimentError(f"{section}.{name} must be above 0, not {value}.")


def one_of(kind: str, name: str, known: Collection[str]) -> None:
    """Check that a name is known.

    Raises:
        UnknownNameError: It is not.
    """
    if name not in known:
        raise UnknownNameError(kind, name, known)


def each_once(section: str, **lists: list[int]) -> None:
    """Check that lists have entries, none twice, and none below 1 (seeds: below 0).

    Raises:
        ExperimentError: A list is empty, or an entry is repeated or too small.
    """
    for name, values in lists.items():
        if not values or len(set(values)) < len(values):
            raise ExperimentError(
                f"{section}.{name} must have at least one entry and none twice, not {values}."
            )
        at_least(section, 0 if name == "seeds" else 1, **{name: min(values)})


@dataclass
class TextConfig:
    """Text cut into windows."""

    source: str = MISSING
    """``self`` (written by the dense model), a text or JSONL file, or a hub data set."""
    windows: int = 4
    window_tokens: int = 128
    seed: int = 0
    field: str = "text"
    """Field of a JSONL file or data set that holds the text."""

    def __post_init__(self) -> None:
        at_least("text", 1, windows=self.windows)
        at_least("text", 2, window_tokens=self.window_tokens)


def self_written() -> TextConfig:
    """Return the settings of text written by the dense model."""
    return TextConfig(source="self")


@dataclass
class TasksConfig:
    """lm-eval tasks; none without names."""

    names: list[str] = field(default_factory=list)
    limit: int | None = None
    """Documents of each task; null for all."""
    data_root: str | None = None
    """Folder with local files of hub tasks, or null."""
    num_fewshot: int = 0

    def __post_init__(self) -> None:
        at_least("tasks", 1, limit=self.limit)
        at_least("tasks", 0, num_fewshot=self.num_fewshot)


class HasCells:
    """Mixin of sections with a field `cells`: requests and budgets as text."""

    cells: list[str]

    @property
    def parsed_cells(self) -> list[Cell]:
        """The cells as (batch size, sequence length in tokens, budget fraction)."""
        return [parse_cell(text) for text in self.cells]


def parse_shape(text: str) -> tuple[int, int]:
    """Parse ``"8x2048"`` into (8, 2048).

    Raises:
        ExperimentError: The text has another form.
    """
    match = _SHAPE.fullmatch(str(text).replace(" ", ""))
    if not match:
        raise ExperimentError(f"A request is BATCHxTOKENS, such as 8x2048; {text!r} is not.")
    return int(match[1]), int(match[2])


def parse_cell(text: str) -> Cell:
    """Parse ``"8x2048@0.85"`` into (8, 2048, 0.85).

    Raises:
        ExperimentError: The text has another form, or the budget is not in (0, 1].
    """
    match = _CELL.fullmatch(str(text).replace(" ", ""))
    if not match:
        raise ExperimentError(
            f"A cell is BATCHxTOKENS@BUDGET, such as 8x2048@0.85; {text!r} is not."
        )
    return (*parse_shape(match[1]), float(match[2]))
