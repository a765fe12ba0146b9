"""The harness that runs, resumes, publishes and reads a study; see `experiments.study`.

A page of the documentation has the lines ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->``;
the tables of that name stand between them.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from experiments.config import Config
from experiments.study.console import say
from experiments.study.json_records import Record, RowFile, row_key, write_text
from experiments.study.run_folder import RunFolder, git_state
from experiments.study.table_format import TitledTable, document, rendered
from rap_env.models.progress import progress_bar

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results"
"""Folder of the committed records."""

Text = Callable[[], str]
"""Makes the text between the markers of a name."""

_MARKED = re.compile(r"(<!-- (\w+): begin -->\n).*?(<!-- \2: end -->)", re.DOTALL)
_NUMBER = re.compile(r"<!--(\w+)-->[^<]*<!---->")
_INTERVAL = re.compile(r"(\[[-+]?\d+\.\d+), ([-+]?\d+\.\d+\])")


def untitled(text: str) -> str:
    """Return a text without its title."""
    return text.partition("\n")[2]


def below(text: str) -> str:
    """Return a text without its title, below a page's second level."""
    return untitled(text).replace("\n## ", "\n### ")


def sections(*titles: str) -> Callable[[str], str]:
    """Return what shows a text as `below` does, with only those sections that have some titles."""

    def shown(text: str) -> str:
        first, *others = below(text).split("\n### ")
        return "\n### ".join([first, *(other for other in others if other.startswith(titles))])

    return shown


@dataclass(frozen=True)
class Published:
    """Committed records of a study, and what the documentation shows of them.

    Attributes:
        name: Name of the markers in a page, and of the page with all tables
            (``docs/results/details/NAME.md``).
        records: The folder of the records, below ``results/``.
        shown: Makes what stands between the markers from all tables, in Markdown with the
            study's title: `untitled` or `below`, for example.
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


def with_tables(
    page: str, texts: Mapping[str, Text], numbers: Callable[[], Mapping[str, str]] = dict
) -> str:
    """Return the text of a page with new tables; no interval is broken into two lines.

    Args:
        page: The text of the page.
        texts: What stands between markers, by their name. Other markers keep what they have.
        numbers: Makes what stands within sentences, between ``<!--NAME-->`` and ``<!---->``.
    """

    def filled(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        if name not in texts:
            return match[0]
        table = _INTERVAL.sub("\\1,\u00a0\\2", texts[name]().strip())
        return f"{begin}\n{table}\n\n{end}"

    page = _MARKED.sub(filled, page)
    return _NUMBER.sub(lambda match: f"<!--{match[1]}-->{numbers()[match[1]]}<!---->", page)


def write_pages(texts: Mapping[str, Text], numbers: Callable[[], Mapping[str, str]] = dict) -> None:
    """Write tables and numbers into all pages that have markers of their names."""
    for page in marked_pages():
        write_changed(page, with_tables(page.read_text(encoding="utf-8"), texts, numbers))


def write_changed(path: Path, text: str) -> None:
    """Write a file only if its text changed, so that Sphinx rebuilds no more than it must."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


RowT = TypeVar("RowT", bound=Record)


@dataclass(frozen=True)
class Job(Generic[RowT]):
    """A row that belongs to a study, before it is measured.

    Attributes:
        row_type: Type of the row; its `Record.file` is where it is stored.
        identity: Values of what `Record.identity` names, in that order.
        depends_on: Hashes and settings that the row depends on. A row is measured once for
            each identity and `depends_on`.
        make: Measures the row; its provenance is added.
        facts: More entries of its provenance, on which it does not depend.
    """

    row_type: type[RowT]
    identity: tuple[Any, ...]
    depends_on: Mapping[str, Any]
    make: Callable[[], RowT]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def key(self) -> str:
        """The key that the row will have."""
        return row_key(*self.identity, {"depends_on": self.depends_on})

    def row(self, git: Mapping[str, Any] | None) -> RowT:
        """Measure the row, with its provenance.

        Args:
            git: State of the checkout, of `git_state`.
        """
        provenance = {"depends_on": dict(self.depends_on), "git": git, **self.facts}
        return replace(self.make(), provenance=provenance)


@dataclass(frozen=True)
class Study:
    """A study: rows that a program measures, and the tables that are made from them.

    Attributes:
        name: Name of the program, its file in ``conf/`` and its run folder.
        title: Heading of ``tables.md``.
        row_types: Types of its rows, each with a `Record.file`.
        jobs: Returns all rows that belong to the study; called with the settings and run
            folder.
        tables: Makes the tables from the rows.
        words: What the tables say, in a sentence or two above them; empty for nothing.
        frozen: Sections of the settings that must not change when a run resumes.
        published: Its committed records, with the markers in the documentation that its
            tables stand between. A run in the folder of such records writes them there.
    """

    name: str
    title: str
    row_types: Sequence[type[Record]]
    jobs: Callable[[Config, Path], Iterable[Job[Any]]]
    tables: Callable[[list[Any]], Sequence[TitledTable]]
    words: Callable[[list[Any]], str] = lambda rows: ""
    frozen: tuple[str, ...] = ("model",)
    published: Sequence[Published] = ()

    def run(self, config: Config, folder: Path) -> Path:
        """Measure the rows that the folder lacks, then write the tables, and print them.

        Returns:
            The run folder.

        Raises:
            ExperimentError: The folder has results of other settings.
            RapError: As `jobs` and what they measure raise.
        """
        run, started = RunFolder(folder), time.monotonic()
        run.start(config, frozen=self.frozen)
        rows = measured(list(self.jobs(config, folder)), folder, self.name, config.progress)
        run.finish(started, rows=len(rows))
        self.publish(rows, folder)
        say(f"{len(rows)} records are in {folder}.")
        return folder

    def read(self, folder: Path) -> list[Any]:
        """Return all rows in a folder, which need not have any."""
        return [row for kind in self.row_types for row in kind.read(folder / kind.file)]

    def publish(self, rows: list[Any], folder: Path) -> None:
        """Write ``tables.md`` into a folder, and print the tables."""
        text = self.markdown(rows)
        write_text(folder / "tables.md", text)
        say(rendered(text))
        for published in self.published:
            if published.folder == folder.resolve():
                write_pages({published.name: partial(published.shown, text)})

    def markdown(self, rows: list[Any]) -> str:
        """Return title, words and all tables in Markdown."""
        tables = document(self.tables(rows), captions=True)
        parts = [f"# {self.title}", self.words(rows), tables]
        return "\n\n".join(filter(None, parts))


def measured(jobs: Sequence[Job[Any]], folder: Path, name: str, progress: bool) -> list[Any]:
    """Return the rows of all jobs, in their order; rows that the folder lacks are measured.

    Args:
        jobs: The jobs.
        folder: The run folder.
        name: Name of the study, for the progress bar.
        progress: Whether to show progress.
    """
    files = {kind: RowFile(folder / kind.file, kind) for kind in {job.row_type for job in jobs}}
    missing = [job for job in jobs if not files[job.row_type].has(job.key)]
    if missing:
        say(f"{name}: {len(missing)} of {len(jobs)} rows are to be measured.")
    git, done = git_state(), len(jobs) - len(missing)
    with progress_bar(progress, total=len(jobs), initial=done, desc=name, unit="row") as bar:
        for job in missing:
            files[job.row_type].get(job.key, partial(job.row, git))
            bar.update()
    return [files[job.row_type][job.key] for job in jobs]
