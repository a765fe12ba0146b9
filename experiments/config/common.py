"""Parts that several sections share: allowed values, texts, tasks and requests."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, get_args, get_origin, get_type_hints

from omegaconf import MISSING

from experiments.study.experiment_errors import ExperimentError
from experiments.study.json_records import Cell
from rap_env.errors import check_name

Rule = Callable[[str, Any], None]
"""Raises an error that names a setting (first argument) if its value is not allowed."""

_SHAPE = re.compile(r"(\d+)x(\d+)")
_PINNED = re.compile(r"(\d+x\d+)@(\d+)(?:~(\d*\.?\d+))?")
_CELL = re.compile(r"(\d+x\d+)@(0?\.\d+|1|1\.0)")


def within(low: float, high: float = math.inf, *, above: bool = False) -> Rule:
    """Return the rule that a number is at least (or, if `above`, above) `low`, at most `high`."""

    def check(name: str, value: Any) -> None:
        is_number = isinstance(value, int | float)
        if not (is_number and (low < value <= high or (value == low and not above))):
            most = "" if high == math.inf else f" and at most {high}"
            raise ExperimentError(
                f"{name} must be {'above' if above else 'at least'} {low}{most}, not {value}."
            )

    return check


def among(*known: str) -> Rule:
    """Return the rule that a name is one of the known ones."""
    return lambda setting, name: check_name(setting, name, known)


def form(parse: Callable[[str], Any]) -> Rule:
    """Return the rule that a text can be parsed."""
    return lambda _, text: parse(text)


def ending(suffix: str) -> Rule:
    """Return the rule that the name of a file ends in a suffix."""

    def check(name: str, value: str) -> None:
        if not value.endswith(suffix):
            raise ExperimentError(f"{name} must end in {suffix}, not {value!r}.")

    return check


def some(name: str, values: list[Any]) -> None:
    """Check that a list has entries."""
    if not values:
        raise ExperimentError(f"{name} needs at least one entry.")


def distinct(name: str, values: list[Any]) -> None:
    """Check that a list has entries, none twice."""
    if not values or len(set(values)) < len(values):
        raise ExperimentError(f"{name} must have at least one entry and none twice, not {values}.")


class Section:
    """Base of settings whose annotations say which values are allowed.

    Attributes:
        section: Name of the section, for messages; empty for settings without a section.
    """

    section: ClassVar[str] = ""

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """The `requests` as (batch size, sequence length in tokens)."""
        return [parse_shape(text) for text in vars(self)["requests"]]

    def __post_init__(self) -> None:
        prefix = f"{self.section}." if self.section else ""
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            _check(f"{prefix}{name}", getattr(self, name), hint)


def _check(name: str, value: Any, hint: Any) -> None:
    if value is None or isinstance(value, dict):
        return
    if get_origin(hint) is Annotated:
        hint, *rules = get_args(hint)
        for rule in rules:
            rule(name, value)
    for part in get_args(hint):
        for entry in value if isinstance(value, list) else [value]:
            _check(name, entry, part)


def _match(pattern: re.Pattern[str], text: str, what: str) -> re.Match[str]:
    """The match of a whole text; an `ExperimentError` says what it should be."""
    match = pattern.fullmatch(str(text).replace(" ", ""))
    if not match:
        raise ExperimentError(f"A {what}; {text!r} is not.")
    return match


def parse_shape(text: str) -> tuple[int, int]:
    """Parse ``"8x2048"`` into (8, 2048).

    Raises:
        ExperimentError: The text has another form.
    """
    match = _match(_SHAPE, text, "request is BATCHxTOKENS, such as 8x2048")
    return int(match[1]), int(match[2])


def parse_cell(text: str) -> Cell:
    """Parse ``"8x2048@0.85"`` into (8, 2048, 0.85).

    Raises:
        ExperimentError: The text has another form, or the budget is not in (0, 1].
    """
    match = _match(_CELL, text, "cell is BATCHxTOKENS@BUDGET, such as 8x2048@0.85")
    return (*parse_shape(match[1]), float(match[2]))


@dataclass(frozen=True)
class Pinned:
    """A request with a budget in bytes.

    Attributes:
        shape: Batch size and sequence length in tokens.
        budget_bytes: The budget.
        target_delta_nll: ΔNLL that a reference method has there, nats per token; None if unknown.
    """

    shape: tuple[int, int]
    budget_bytes: int
    target_delta_nll: float | None = None

    def __str__(self) -> str:
        target = "" if self.target_delta_nll is None else f"~{self.target_delta_nll:g}"
        return f"{self.shape[0]}x{self.shape[1]}@{self.budget_bytes}{target}"


def parse_pinned(text: str) -> Pinned:
    """Parse ``"8x2048@101234567"`` or ``"8x2048@101234567~0.5"``.

    The number behind ``~`` is the ΔNLL that the budget stands for.

    Raises:
        ExperimentError: The text has another form.
    """
    shown = "BATCHxTOKENS@BYTES or BATCHxTOKENS@BYTES~DELTA_NLL, such as 8x2048@101234567~0.5"
    match = _match(_PINNED, text, f"pinned cell is {shown}")
    target = None if match[3] is None else float(match[3])
    return Pinned(parse_shape(match[1]), int(match[2]), target)


Count = Annotated[int, within(1)]
CountOrZero = Annotated[int, within(0)]
NotNegative = Annotated[float, within(0)]
Positive = Annotated[float, within(0, above=True)]
Share = Annotated[float, within(0, 1)]
Fraction = Annotated[float, within(0, 1, above=True)]
CellText = Annotated[str, form(parse_cell)]
PinnedText = Annotated[str, form(parse_pinned)]
ShapeText = Annotated[str, form(parse_shape)]


@dataclass
class TextConfig(Section):
    """Text cut into windows."""

    section = "text"
    source: str = MISSING
    """``self`` (written by the dense model), a text or JSONL file, or a hub data set."""
    windows: Count = 4
    """Number of windows."""
    window_tokens: Annotated[int, within(2)] = 128
    """Tokens of each window."""
    seed: int = 0
    """Seed of the choice of windows, or of the model that writes them."""
    field: str = "text"
    """Field of a JSONL file or data set that holds the text."""
