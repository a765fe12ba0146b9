"""Tables of committed records in pages of the documentation, between their markers.

A page has the lines ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->``; the tables of that name
stand between them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results"
"""Folder of the committed records."""

Text = Callable[[], str]
"""Makes the text between the markers of a name."""

_MARKED = re.compile(r"(<!-- (\w+): begin -->\n).*?(<!-- \2: end -->)", re.DOTALL)
_INTERVAL = re.compile(r"(\[[-+]?\d+\.\d+), ([-+]?\d+\.\d+\])")


def untitled(text: str) -> str:
    """Return a text without its title."""
    return text.partition("\n")[2]


def below(text: str) -> str:
    """Return a text without its title, below a page's second level."""
    return untitled(text).replace("\n## ", "\n### ")


def first_section(text: str) -> str:
    """Return the first section of a text, without its title."""
    return untitled(text.split("\n## ")[1])


@dataclass(frozen=True)
class Published:
    """Committed records of a study, and what the documentation shows of them.

    Attributes:
        name: Name of the markers in a page, of the page with all tables
            (``docs/results/details/NAME.md``), and of the figures (``docs/_generated/NAME*.png``).
        records: The folder of the records, below ``results/``.
        shown: Makes what stands between the markers from all tables, in Markdown with the study's
            title: `untitled`, `below` or `first_section`, for example.
    """

    name: str
    records: str
    shown: Callable[[str], str] = below

    @property
    def folder(self) -> Path:
        """The folder of the records."""
        return RESULTS / self.records


def marked_pages() -> list[Path]:
    """Return README.md and the pages of the documentation that have markers."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
    return [page for page in pages if _MARKED.search(page.read_text(encoding="utf-8"))]


def with_tables(page: str, texts: Mapping[str, Text]) -> str:
    """Return the text of a page with new tables; no interval is broken into two lines.

    Args:
        page: The text of the page.
        texts: What stands between markers, by their name. Other markers keep what they have.
    """

    def filled(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        if name not in texts:
            return match[0]
        table = _INTERVAL.sub("\\1,\u00a0\\2", texts[name]().strip())
        return f"{begin}\n{table}\n\n{end}"

    return _MARKED.sub(filled, page)


def write_pages(texts: Mapping[str, Text]) -> None:
    """Write tables into all pages that have markers of their names."""
    for page in marked_pages():
        write_changed(page, with_tables(page.read_text(encoding="utf-8"), texts))


def write_changed(path: Path, text: str) -> None:
    """Write a file only if its text changed, so that Sphinx rebuilds no more than it must."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
