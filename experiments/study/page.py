"""An HTML page: figures, tables and sections in a template, without external resources."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments.study.errors import MissingGroupError
from experiments.study.figures import PNG_DPI, Draw, style, svg_uri
from experiments.study.looks import look
from experiments.study.tables import Table, TitledTable
from rap_env.artifacts import atomic_write


def titled_parts(tables: Iterable[TitledTable], methods: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return tables with titles and captions as parts of a section."""
    return [
        {
            "body": coloured(part.table, methods if part.by_method else {}),
            "title": part.title,
            "folded": part.detail,
            "caption": part.caption,
        }
        for part in tables
    ]


def coloured(table: Table, methods: Mapping[str, str]) -> dict[str, Any]:
    """Return a table with the colour of the method that the first cell of a row names."""
    header, rows = table
    looks = {name: look(method) for name, method in methods.items()}
    shown = [
        {
            "cells": cells,
            "colour": looks[cells[0]].colour if cells[0] in looks else "",
            "learned": cells[0] in looks and looks[cells[0]].learned,
        }
        for cells in rows
    ]
    return {"header": header, "rows": shown}


class Gallery:
    """Draws and numbers the figures of a page, and writes them as PNG files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0

    def figure(self, name: str, title: str, caption: str, draw: Draw) -> dict[str, Any]:
        """Draw a figure in its wide and narrow forms, for the template."""
        self.count += 1
        wide = draw(False)
        with style(), atomic_write(self.folder / f"{name}.png") as file:
            wide.savefig(file, format="png", dpi=PNG_DPI)
        return {
            "name": name, "number": self.count, "title": title, "caption": caption,
            "wide": svg_uri(wide), "narrow": svg_uri(draw(True)),
        }  # fmt: skip


def write_page(template: Path, path: Path, **content: Any) -> None:
    """Render a template to a file.

    Raises:
        MissingGroupError: jinja2 is not installed.
        StorageFullError: The disk is full.
    """
    try:
        import jinja2
    except ImportError:
        raise MissingGroupError("jinja2", "The report", "agents") from None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    text = environment.get_template(template.name).render(**content)
    with atomic_write(path) as file:
        file.write(text.encode())
