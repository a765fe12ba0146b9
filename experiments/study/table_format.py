"""Tables from lines and columns, as text and Markdown, and formats of numbers."""

from __future__ import annotations

import itertools
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import pandas as pd

from experiments.study.statistics import Estimate

TIMES = "\N{MULTIPLICATION SIGN}"
"""Sign between batch size and tokens."""

TERMINAL_COLUMNS = 100


class TitledTable(NamedTuple):
    """A table with its place in a document.

    Attributes:
        table: Its cells are texts.
        title: Heading; empty for none.
        caption: Meaning of its numbers; empty for none. Markdown has it only if asked to.
    """

    table: pd.DataFrame
    title: str = ""
    caption: str = ""


LineT = TypeVar("LineT")
ColumnT = TypeVar("ColumnT")


def columns_table(
    lines: Iterable[LineT], columns: Mapping[str, Callable[[LineT], str]]
) -> pd.DataFrame:
    """Return a table with a row for each line.

    Args:
        lines: What the rows are made from.
        columns: What each column shows of a line, by the column's header.
    """
    rows = [[show(line) for show in columns.values()] for line in lines]
    return pd.DataFrame(rows, columns=[*columns], dtype=str)


def crossed_table(
    corner: str,
    lines: Mapping[str, LineT],
    columns: Mapping[str, ColumnT],
    entry: Callable[[LineT, ColumnT], str],
) -> pd.DataFrame:
    """Return a table with an entry for each pair of line and column.

    Args:
        corner: Header of the first column.
        lines: The lines by their first cell.
        columns: The columns by their header.
        entry: Formats an entry.
    """
    rows = [[name, *(entry(line, of) for of in columns.values())] for name, line in lines.items()]
    return pd.DataFrame(rows, columns=[corner, *columns], dtype=str)


def document(tables: Iterable[TitledTable], *, captions: bool = False) -> str:
    """Format tables as Markdown, each below its title."""
    parts = []
    for part in tables:
        parts += [f"## {part.title}\n"] if part.title else []
        parts += [f"{part.caption}\n"] if part.caption and captions else []
        parts.append(markdown(part.table))
    return "\n".join(parts)


def markdown(table: pd.DataFrame, left: int = 1) -> str:
    """Format a table as Markdown; the `left` first columns are left-aligned, others right.

    Unlike `pandas.DataFrame.to_markdown` it pads no cells, so that a new number changes one line.
    """
    rule = [":---"] * left + ["---:"] * (len(table.columns) - left)
    lines = [[*table.columns], rule, *table.to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def plain(table: pd.DataFrame) -> str:
    """Format a table as aligned text."""
    lines = [[*table.columns], *table.to_numpy().tolist()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])

    def aligned(cells: Sequence[str]) -> str:
        padded = [f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)]
        return "  ".join([cells[0].ljust(widths[0]), *padded[1:]]).rstrip()

    return "\n".join(map(aligned, lines))


def rendered(text: str) -> str:
    """Render Markdown for the terminal: aligned tables, and other lines wrapped."""
    shown = []
    for is_table, lines in itertools.groupby(text.splitlines(), lambda line: line[:1] == "|"):
        if is_table:
            header, _, *rows = [line[2:-2].split(" | ") for line in lines]
            shown.append(plain(pd.DataFrame(rows, columns=header)))
            continue
        for line in lines:
            title = re.sub(r"^# (.*)", r"== \1 ==", line)
            shown.append(wrapped(re.sub(r"^## (.*)", r"-- \1 --", title)))
    return "\n".join(shown)


def wrapped(text: str) -> str:
    """Break text into lines for the terminal."""
    return textwrap.fill(text, TERMINAL_COLUMNS)


def percent(value: float | None, digits: int = 1) -> str:
    """Format a share as per cent; a dash for None."""
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def precise(estimate: Estimate) -> str:
    """Format a mean with its interval, with four decimals where it is small."""
    digits = 4 if abs(estimate.mean) < 0.01 else 3
    mean, low, high = (
        f"{value:.{digits}f}" for value in (estimate.mean, estimate.low, estimate.high)
    )
    return f"{mean} [{low}, {high}]"


def signed(estimate: Estimate) -> str:
    """Format a difference with its sign and interval."""
    return f"{estimate.mean:+.3f} [{estimate.low:+.3f}, {estimate.high:+.3f}]"


def relative_words(estimate: Estimate | None) -> str:
    """Format a relative difference in per cent with its interval, if several windows give one.

    A dash for None.
    """
    if estimate is None:
        return "-"
    mean, low, high = (100 * value for value in (estimate.mean, estimate.low, estimate.high))
    return f"{mean:+.1f} %" + (f" [{low:+.1f}, {high:+.1f}]" if low < high else "")


def seconds(value: float) -> str:
    """Format a duration in ms, s or min."""
    if value >= 120:
        return f"{value / 60:.1f} min"
    return f"{1000 * value:.1f} ms" if value < 0.1 else f"{value:.2f} s"


def number(value: float) -> str:
    """Format a count or a mean of counts, with a decimal only if it needs one."""
    return f"{value:,.0f}" if value == round(value) or value >= 100 else f"{value:.1f}"


def shape_words(shape: Sequence[float]) -> str:
    """Format batch size and tokens, the first two values of a shape or cell."""
    return f"{shape[0]} {TIMES} {shape[1]:,}"


def mebibytes(value: float) -> str:
    """Format bytes as MiB."""
    return f"{value / 2**20:,.0f} MiB"


def text_words(text: dict[str, object]) -> str:
    """Describe source and size of a text, from its provenance."""
    if not text:
        return "unknown"
    source = "written by the native model itself" if text["source"] == "self" else text["source"]
    return f"{source}, {text['windows']} windows of {text['window_tokens']} tokens"
