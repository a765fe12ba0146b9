"""``python -m experiments.repair``: fit and distil stubs, and measure what they recover."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from experiments.config import Config
from experiments.contexts import task_config
from experiments.repair.libraries import StubLibraries
from experiments.repair.rows import RepairComparison, RepairRow
from experiments.repair.tables import delta_nll_against_peak, repair_tables
from experiments.study.harness import Job, Study
from experiments.study.records import Cell, delta_nll_fields, request_field
from rap_env.memory import MemoryModel
from rap_env.models.live.elastic import ElasticLLM
from rap_env.plan import Plan
from rap_env.policies.loading import make_method
from rap_env.repair.stub_library import StubLibrary
from rap_env.request import Request
from rap_env.scoring.scorer import MaskScorer


@dataclass(frozen=True)
class Entry:
    """One library that is evaluated.

    Attributes:
        fitted_on: Names of the texts it was fitted on.
        library: The stubs; None for removal without stubs.
        searched_with: Name and stubs of the search that chose the masks.
    """

    study: str
    repair: str
    fitted_on: list[str]
    library: StubLibrary | None
    searched_with: tuple[str, StubLibrary | None]


def repair_jobs(config: Config, folder: Path) -> Iterator[Job[RepairRow]]:
    """Yield every library, cell and text; existing libraries are not made again."""
    libraries = StubLibraries(config, folder)
    compared = list(entries(libraries))
    evaluator = RepairEvaluator(libraries)
    for entry in compared:
        for cell in config.stubs.cells_of(entry.study):
            for text in libraries.texts.report:
                yield Job(
                    RepairRow,
                    (entry.study, entry.repair, cell, text),
                    evaluator.depends_on(entry, text),
                    partial(evaluator.row, entry, cell, text),
                )


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
        yield Entry("grid", name, every if name != "none" else [], library, (name, library))
    shared = ("library", libraries.library)
    least = min(len(libraries.texts.fit[name].tokens) for name in stubs.domain_study or every)
    for name in stubs.domain_study:
        library = libraries.fitted(f"domain-{name}", [name], least)
        yield Entry("domain", "library", [name], library, shared)


class RepairEvaluator:
    """Chooses masks for each library and measures them on the report texts."""

    def __init__(self, libraries: StubLibraries) -> None:
        self._libraries = libraries
        self._masks: dict[tuple[str, Cell], Plan] = {}
        self._accuracies: dict[tuple[str, Plan], dict[str, float]] = {}

    def row(self, entry: Entry, cell: Cell, text: str, provenance: dict[str, Any]) -> RepairRow:
        """Measure the mask of a cell on a text."""
        libraries = self._libraries
        request = Request.at_fraction(libraries.context.memory, *cell)
        mask = self._mask(entry, cell)
        view = libraries.view(entry.library)
        dense = libraries.report[text].window_nll(Plan())
        scorer = MaskScorer(view, libraries.texts.report[text], libraries.context.store)
        grid = entry.study == "grid"
        return RepairRow(
            study=entry.study,
            repair=entry.repair,
            request=request_field(cell[:2]),
            budget_fraction=cell[2],
            budget_bytes=request.budget_bytes,
            peak_bytes=MemoryModel(view).peak_bytes(mask, request),
            text=text,
            fitted_on=entry.fitted_on,
            fit_tokens=int(entry.library.provenance["text"]["tokens"]) if entry.library else 0,
            mask=list(mask.removed_names),
            **delta_nll_fields(scorer.window_nll(mask) - dense),
            accuracies=self._measured_accuracies(view, mask) if grid else {},
            dense_accuracies=self._measured_accuracies(libraries.llm, Plan()) if grid else {},
            provenance=provenance,
        )

    def depends_on(self, entry: Entry, text: str) -> dict[str, Any]:
        """What a row of a library depends on."""
        libraries = self._libraries
        return {
            "model_fingerprint": libraries.llm.fingerprint,
            "dtype": libraries.llm.facts.dtype,
            "calibration_sha256": libraries.context.corpus.sha256,
            "report_sha256": libraries.texts.report[text].sha256,
            "stubs": "" if entry.library is None else entry.library.sha256,
            "tasks": libraries.config.evaluate.tasks if entry.study == "grid" else {},
        }

    def _mask(self, entry: Entry, cell: Cell) -> Plan:
        """Return the mask of the greedy search with the entry's search stubs, at equal bytes."""
        name, library = entry.searched_with
        if (name, cell) not in self._masks:
            search = make_method("greedy_per_byte", self._libraries.context_with(library))
            self._masks[name, cell] = search.choose(
                Request.at_fraction(self._libraries.context.memory, *cell)
            )
        return self._masks[name, cell]

    def _measured_accuracies(self, view: ElasticLLM, mask: Plan) -> dict[str, float]:
        """Return the accuracy of each lm-eval task in [0, 1]; empty without tasks."""
        settings = self._libraries.config.evaluate.tasks
        if not settings["names"]:
            return {}
        from rap_env.scoring.tasks import TaskScorer

        key = view.facts.repair, mask
        if key not in self._accuracies:  # the same for all report texts
            scorer = TaskScorer(view, task_config(settings), store=self._libraries.context.store)
            self._accuracies[key] = scorer.accuracies(mask)
        return self._accuracies[key]


STUDY = Study(
    "repair",
    "Repair",
    [RepairRow],
    repair_jobs,
    repair_tables,
    data=RepairComparison,
    figures={"repair_delta_nll_against_peak": delta_nll_against_peak},
    frozen=(
        "model", "calibration", "importance", "workload", "stubs.fit_texts", "stubs.report_texts",
        "stubs.held_back_share", "stubs.rank", "stubs.distill_steps", "stubs.distill_windows",
        "stubs.learning_rate",
    ),
)  # fmt: skip
