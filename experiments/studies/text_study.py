"""``python -m experiments.studies.text_study``: is there a gain in knowing the kind of text?"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from agents.baselines import BASELINES
from experiments.comparison.formatting import publish_tables
from experiments.comparison.run_folder import RunFolder
from experiments.config import Config
from experiments.config.studies import TextStudyConfig
from experiments.console import say
from experiments.errors import ExperimentError
from experiments.launch import launch
from experiments.studies.rows import StudyRow, search_evaluations
from experiments.studies.setup import (
    Judge,
    Search,
    StudyBench,
    all_disjoint,
    bar,
    baseline_maker,
    gsi_identity,
)
from experiments.studies.text_search import LazyPerByteBaseline
from experiments.studies.text_tables import SHARED, SHARED_ALL, TextComparison
from rap_env.errors import UnknownNameError
from rap_env.scoring.corpus import Corpus

FILE = "text_study.jsonl"
OWN = {LazyPerByteBaseline.name: LazyPerByteBaseline}
METHODS = (*BASELINES, *OWN)
_FROZEN = ("model", "repair", "text_study.method", "text_study.texts", "text_study.report_windows")


def text_study(config: Config, folder: Path) -> Path:
    """Search masks on each kind of text and on all together, and judge each on every kind.

    Args:
        config: All settings.
        folder: Where ``text_study.jsonl`` and ``tables.md`` go.

    Returns:
        The path of ``text_study.jsonl``.

    Raises:
        RapError: A setting cannot be, a text is too short or overlaps with a report text, a
            budget cannot be met, or a record is damaged.
    """
    _check(config.text_study)
    run, started = RunFolder(folder), time.monotonic()
    run.start(config, frozen=_FROZEN)
    rows = _rows(config, folder)
    evaluations = search_evaluations(rows, per_cell=config.text_study.method != "gsi")
    run.finish(started, rows=len(rows), evaluations=evaluations)
    found = TextComparison(rows)
    publish_tables(folder, found.markdown(), found.text())
    say(f"{evaluations:,} evaluations to search the masks; {len(rows)} records in {folder / FILE}.")
    return folder / FILE


def _rows(config: Config, folder: Path) -> list[StudyRow]:
    """A row for each text searched on, cell and report text."""
    settings, bench = config.text_study, StudyBench(config)
    kinds = bench.load_all(settings.texts, "calibration")
    report_texts = {
        name: replace(text, windows=settings.report_windows)
        for name, text in settings.texts.items()
    }
    report = bench.load_all(report_texts, "report")
    all_disjoint(list(kinds.values()), list(report.values()))
    judge = Judge("text", bench, report, folder / FILE)
    rows: list[StudyRow] = []
    for name, corpus in bar(config, "text study", list(searched_texts(kinds, settings).items())):
        rows += judge.rows(_search(bench, name, corpus), settings.parsed_cells)
    return rows


def searched_texts(kinds: Mapping[str, Corpus], settings: TextStudyConfig) -> dict[str, Corpus]:
    """Each kind alone, an equal part of each with as many tokens as one kind has, and all text."""
    windows = len(next(iter(kinds.values())).tokens)
    least, more = divmod(windows, len(kinds))
    parts = {
        name: text.spread(least + (number < more))
        for number, (name, text) in enumerate(kinds.items())
    }
    found = {**kinds, SHARED: Corpus.joined(parts)}
    if settings.all_tokens:
        found[SHARED_ALL] = Corpus.joined(kinds)
    return found


def _search(bench: StudyBench, name: str, corpus: Corpus) -> Search:
    method = bench.config.text_study.method
    identity = gsi_identity(bench.config) if method == "gsi" else {}
    seed = int(corpus.provenance.get("seed", 0))
    return Search(method, name, seed, bench.on(corpus), baseline_maker(method, **OWN), identity)


def _check(settings: TextStudyConfig) -> None:
    """Refuse what cannot be compared, before anything is measured.

    Raises:
        ExperimentError: There are fewer than two kinds or no cells, or kinds differ in size.
        UnknownNameError: There is no such method.
    """
    if settings.method not in METHODS:
        raise UnknownNameError("text_study.method", settings.method, METHODS)
    names = list(settings.texts)
    if len(names) < 2 or {SHARED, SHARED_ALL} & set(names) or not settings.cells:
        raise ExperimentError(
            f"text_study needs a cell, and two kinds of text with names other than {SHARED!r} "
            f"and {SHARED_ALL!r}; got the texts {names} and the cells {settings.cells}."
        )
    sizes = {name: (text.windows, text.window_tokens) for name, text in settings.texts.items()}
    windows = min(count for count, _ in sizes.values())
    if len(set(sizes.values())) > 1 or windows < len(names):
        raise ExperimentError(
            "All of text_study.texts need the same windows and window_tokens, and as many windows "
            f"as there are kinds, so that a shared text has a part of each; got {sizes}."
        )


if __name__ == "__main__":
    launch("text_study", text_study)
