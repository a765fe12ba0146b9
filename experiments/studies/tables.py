"""What the tables of all studies share, and how a study ends."""

from __future__ import annotations

import textwrap
from pathlib import Path

from experiments.comparison.statistics import Estimate
from experiments.comparison.tables import TERMINAL_COLUMNS
from experiments.console import say
from rap_env.artifacts import atomic_write

TABLES = "tables.md"


def signed(found: Estimate) -> str:
    """A difference with its sign and interval."""
    return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def wrapped(text: str) -> str:
    """Words for the terminal, broken into lines."""
    return textwrap.fill(text, TERMINAL_COLUMNS)


def show(folder: Path, in_markdown: str, in_terminal: str) -> None:
    """Write a study's tables into its folder, and print them.

    Raises:
        StorageFullError: The disk is full.
    """
    with atomic_write(folder / TABLES) as file:
        file.write(in_markdown.encode())
    say(in_terminal)
