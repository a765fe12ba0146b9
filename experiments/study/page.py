"""The HTML page: sections and figures in a template, without external resources."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from experiments.errors import MissingGroupError
from experiments.study.figures import PNG_DPI, Draw, style, svg_uri
from experiments.study.looks import look
from experiments.study.tables import Table, TitledTable
from rap_env.artifacts import atomic_write


@dataclass(frozen=True)
class Part:
    """A paragraph, table, figure or fact list of a section."""

    kind: Literal["text", "table", "figure", "facts"]
    body: Any
    title: str = ""
    folded: bool = False
    words: bool = False


@dataclass
class Section:
    """A heading and its parts."""

    name: str
    title: str
    parts: list[Part] = field(default_factory=list)

    def text(self, body: str) -> None:
        """Add a paragraph."""
        self.parts.append(Part("text", body))

    def table(
        self, table: Table, methods: dict[str, str] | None = None, *,
        title: str = "", folded: bool = False, words: bool = False,
    ) -> None:  # fmt: skip
        """Add a table.

        Args:
            table: Header and rows.
            methods: Method of each first cell, for its colour.
            title: Heading of the table.
            folded: Whether the table is collapsed at first.
            words: Whether its cells are text and therefore left-aligned.
        """
        header, rows = table
        named = methods or {}
        shown = [
            {
                "cells": cells,
                "colour": look(named[cells[0]]).colour if cells[0] in named else "",
                "learned": cells[0] in named and look(named[cells[0]]).learned,
            }
            for cells in rows
        ]
        self.parts.append(Part("table", {"header": header, "rows": shown}, title, folded, words))

    def document(self, tables: Iterable[TitledTable], methods: dict[str, str]) -> None:
        """Add tables with their titles and captions."""
        for part in tables:
            named = methods if part.by_method else None
            self.table(part.table, named, title=part.title, folded=part.detail)
            if part.caption:
                self.text(part.caption)

    def facts(self, pairs: list[tuple[str, str]], title: str = "") -> None:
        """Add a list of names and values."""
        self.parts.append(Part("facts", pairs, title))


class Gallery:
    """Draws and numbers the figures of a page, and writes them as PNG files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0

    def add(self, section: Section, name: str, title: str, caption: str, draw: Draw) -> None:
        """Draw a figure in its wide and narrow forms and add it to a section."""
        self.count += 1
        wide = draw(False)
        with style(), atomic_write(self.folder / f"{name}.png") as file:
            wide.savefig(file, format="png", dpi=PNG_DPI)
        body = {
            "name": name, "number": self.count, "title": title, "caption": caption,
            "wide": svg_uri(wide), "narrow": svg_uri(draw(True)),
        }  # fmt: skip
        section.parts.append(Part("figure", body))


def write_page(path: Path, **content: Any) -> None:
    """Render the template to a file.

    Raises:
        MissingGroupError: jinja2 is not installed.
        StorageFullError: The disk is full.
    """
    try:
        import jinja2
    except ImportError:
        raise MissingGroupError("jinja2", "The report", "agents") from None
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined
    )
    text = environment.get_template("report.html.j2").render(**content)
    with atomic_write(path) as file:
        file.write(text.encode())
