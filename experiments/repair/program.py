"""``python -m experiments.repair``: fit and distil stubs, and measure what they recover."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from experiments.config import Config
from experiments.contexts import described_tasks, task_config
from experiments.repair.libraries import StubLibraries
from experiments.repair.records import ORDERS_FILE, RepairRow, write_orders
from experiments.study.records import Cell, RowFile, delta_nll_fields, row_key
from experiments.study.run_folder import RunFolder, git_state
from rap_env.memory import MemoryModel
from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.progress import progress_bar
from rap_env.plan import Plan
from rap_env.policies.loading import make_method
from rap_env.repair.fitting import fit_for_mask
from rap_env.repair.stub_library import StubLibrary
from rap_env.request import Request
from rap_env.scoring.scorer import MaskScorer

log = logging.getLogger(__name__)


FILE = "repair.jsonl"
_PER_MASK_WINDOWS = 64
_FROZEN = (
    "model", "calibration", "importance", "workload", "stubs.fit_texts", "stubs.report_texts",
    "stubs.held_back_share", "stubs.rank", "stubs.distill_steps", "stubs.distill_windows",
    "stubs.learning_rate",
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One library that is evaluated.

    Attributes:
        fitted_on: Names of the texts it was fitted on.
        library: The stubs; None for removal without stubs. For ``per_mask`` the library with its
            mask and ranks.
        searched_with: Name and stubs of the search that chose the masks.
    """

    study: str
    repair: str
    fitted_on: list[str]
    library: StubLibrary | None
    searched_with: tuple[str, StubLibrary | None]


def repair(config: Config, folder: Path) -> Path:
    """Make the libraries and compare them; existing libraries and rows are not made again.

    Returns:
        The path of ``repair.jsonl``.
    """
    run, started = RunFolder(folder), time.monotonic()
    run.start(config, frozen=_FROZEN)
    libraries = StubLibraries(config, folder)
    compared = list(entries(libraries))
    evaluator = RepairEvaluator(libraries)
    rows = evaluator.rows(compared)
    grid = [entry.repair for entry in compared if entry.study == "grid"]
    orders = {name: libraries.importance(name) for name in grid if name != "per_mask"}
    if orders:
        write_orders(folder / ORDERS_FILE, orders)
    dense = evaluator.accuracies(libraries.llm, Plan())
    run.finish(started, rows=len(rows), dense_accuracies=dense)
    log.info("Repair: %d rows in %s.", len(rows), folder / FILE)
    return folder / FILE


def entries(libraries: StubLibraries) -> Iterator[Entry]:
    """Yield everything that is compared; libraries are made when they are reached."""
    stubs = libraries.config.stubs
    every = list(libraries.texts.fit)
    _ = libraries.library
    if stubs.distill_steps:
        _ = libraries.distilled
    for name in stubs.repairs:
        if name == "distilled" and not stubs.distill_steps:
            continue
        library = libraries.stubs_of(name)
        own = ("library", libraries.library) if name == "per_mask" else (name, library)
        yield Entry("grid", name, every if name != "none" else [], library, own)
    shared = ("library", libraries.library)
    window_tokens = next(iter(libraries.texts.fit.values())).tokens.shape[1]
    for tokens in stubs.token_study:
        library = libraries.fitted(f"tokens-{tokens}", every, max(1, tokens // window_tokens))
        yield Entry("tokens", "library", every, library, shared)
    least = min(len(libraries.texts.fit[name].tokens) for name in stubs.domain_study or every)
    for name in stubs.domain_study:
        library = libraries.fitted(f"domain-{name}", [name], least)
        yield Entry("domain", "library", [name], library, shared)
    for name in stubs.alone:
        library = libraries.fitted(f"alone-{name}", [name])
        yield Entry("alone", "library", [name], library, (name, library))


class RepairEvaluator:
    """Chooses masks for each library and measures them on the report texts."""

    def __init__(self, libraries: StubLibraries) -> None:
        self._libraries = libraries
        self._git = git_state()
        self._file = RowFile(libraries.folder / FILE, RepairRow)
        self._masks: dict[tuple[str, Cell], Plan] = {}
        self._own_stubs: dict[Cell, StubLibrary] = {}
        self._accuracies: dict[tuple[str, Plan], dict[str, float]] = {}

    def rows(self, compared: list[Entry]) -> list[RepairRow]:
        """Return the rows of all entries, cells and texts; new rows are appended to the file."""
        config = self._libraries.config
        work = [(entry, cell) for entry in compared for cell in config.stubs.cells_of(entry.study)]
        bar = progress_bar(config.progress, work, desc="repair", unit="cell")
        rows = []
        for entry, cell in bar:
            bar.set_postfix_str(f"{entry.study} {entry.repair}")
            for text in self._libraries.texts.report:
                provenance = self._provenance(entry, text)
                key = row_key(entry.study, entry.repair, cell, text, provenance)
                measure = partial(self._row, entry, cell, text, provenance)
                rows.append(self._file.get(key, measure))
        return rows

    def _row(self, entry: Entry, cell: Cell, text: str, provenance: dict[str, Any]) -> RepairRow:
        request, mask = self._request(cell), self._mask(entry, cell)
        library = self._stubs(entry, cell)
        libraries = self._libraries
        view = libraries.view(library)
        dense = libraries.report[text].window_nll(Plan())
        scorer = MaskScorer(view, libraries.texts.report[text], libraries.context.store)
        return RepairRow(
            study=entry.study,
            repair=entry.repair,
            request={"batch_size": cell[0], "seq_len_tokens": cell[1]},
            budget_fraction=cell[2],
            budget_bytes=request.budget_bytes,
            peak_bytes=MemoryModel(view).peak_bytes(mask, request),
            text=text,
            fitted_on=entry.fitted_on,
            fit_tokens=0 if library is None else int(library.provenance["text"]["tokens"]),
            mean_rank=0.0 if library is None else float(np.mean(list(library.ranks.values()))),
            mask=list(mask.removed_names),
            mask_from=entry.searched_with[0],
            **delta_nll_fields(scorer.window_nll(mask) - dense),
            accuracies=self.accuracies(view, mask) if entry.study == "grid" else {},
            provenance=provenance,
        )

    def _request(self, cell: Cell) -> Request:
        """Return the request of a cell; its budget is a fraction of the dense peak."""
        return Request.at_fraction(self._libraries.context.memory, *cell)

    def _mask(self, entry: Entry, cell: Cell) -> Plan:
        """Return the mask of the greedy search with the entry's search stubs, at equal bytes."""
        name, library = entry.searched_with
        if (name, cell) not in self._masks:
            search = make_method("greedy_per_byte", self._libraries.context_with(library))
            self._masks[name, cell] = search.choose(self._request(cell))
        return self._masks[name, cell]

    def _stubs(self, entry: Entry, cell: Cell) -> StubLibrary | None:
        """Return the stubs of the removed blocks; those of ``per_mask`` are fitted for the mask."""
        if entry.repair != "per_mask" or entry.library is None:
            return entry.library
        if cell not in self._own_stubs:
            libraries = self._libraries
            text, held_back = libraries.texts.fitted(entry.fitted_on)
            ranks = {index: stub.rank for index, stub in entry.library.stubs.items()}
            self._own_stubs[cell] = fit_for_mask(
                libraries.llm,
                self._mask(entry, cell),
                text.spread(min(_PER_MASK_WINDOWS, len(text.tokens))),
                libraries.held_back_subset(held_back, _PER_MASK_WINDOWS),
                libraries.fit_config,
                ranks=ranks,
            )
        return self._own_stubs[cell]

    def accuracies(self, view: ElasticLLM, mask: Plan) -> dict[str, float]:
        """Return the accuracy of each lm-eval task in [0, 1]; empty without tasks."""
        settings = self._libraries.config.evaluate.tasks
        if not settings.names:
            return {}
        from rap_env.scoring.tasks import TaskScorer

        key = view.facts.repair, mask
        if key not in self._accuracies:  # the same for all report texts
            scorer = TaskScorer(view, task_config(settings), store=self._libraries.context.store)
            self._accuracies[key] = scorer.accuracies(mask)
        return self._accuracies[key]

    def _provenance(self, entry: Entry, text: str) -> dict[str, Any]:
        """Describe what a row depends on, and the commit."""
        libraries = self._libraries
        depends_on = {
            "model_fingerprint": libraries.llm.fingerprint,
            "dtype": libraries.llm.facts.dtype,
            "calibration_sha256": libraries.context.corpus.sha256,
            "report_sha256": libraries.texts.report[text].sha256,
            "stubs": "" if entry.library is None else entry.library.sha256,
            "tasks": described_tasks(libraries.config.evaluate.tasks)
            if entry.study == "grid"
            else {},
        }
        return {"depends_on": depends_on, "git": self._git}
