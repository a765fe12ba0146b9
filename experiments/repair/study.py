"""``python -m experiments.repair``: fit stubs, and measure how much ΔNLL they recover."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from experiments.config import Config
from experiments.config.common import TextConfig
from experiments.contexts import build_context, load_texts, task_config
from experiments.repair.rows import PLAIN, RepairComparison, RepairRow
from experiments.repair.tables import repair_tables
from experiments.study.errors import ExperimentError
from experiments.study.harness import Job, Study
from experiments.study.records import Cell, delta_nll_fields, request_field
from rap_env.context.live import LiveContext
from rap_env.memory import MemoryModel
from rap_env.models.live.elastic import ElasticLLM
from rap_env.plan import Plan
from rap_env.policies.loading import make_method
from rap_env.repair.fitting import fit_library
from rap_env.repair.stub_library import StubLibrary
from rap_env.request import Request
from rap_env.scoring.corpus import Corpus, ensure_disjoint
from rap_env.scoring.scorer import MaskScorer

log = logging.getLogger(__name__)

_MIN_HELD_BACK = 4  # windows of each text
_HELD_BACK_SHARE = 0.25  # of the windows fitted on, to choose ranks and penalties


class RepairStudy:
    """The model with stubs and without, its texts, and the masks that a search chooses.

    Attributes:
        llm: The model without stubs.
        library: Stubs that are fitted on all texts together; read from the folder if it has them.
        report: The texts to report on; none of them is fitted on.

    Raises:
        CorpusError: A text is missing, too short, or overlaps with another.
        ExperimentError: No text to fit or report on is given, or the model cannot be fitted.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        if not config.stubs.fit_texts or not config.stubs.report_texts:
            raise ExperimentError("stubs.fit_texts and stubs.report_texts need an entry each.")
        if config.repair["name"] != PLAIN:
            raise ExperimentError(
                f"experiments.repair fits stubs itself and compares them with none: leave "
                f"repair.name at 'none', not {config.repair['name']!r}."
            )
        self._config = config
        self._context = build_context(config, profiled=False)
        self.llm = self._context.llm
        stubs, progress = config.stubs, config.progress
        parts = {name: self._held_back_part(text) for name, text in stubs.fit_texts.items()}
        self.report = load_texts(stubs.report_texts, "report", self.llm, progress=progress)
        held_back = load_texts(parts, "selection", self.llm, progress=progress)
        fit = load_texts(stubs.fit_texts, "calibration", self.llm, progress=progress)
        for text in self.report.values():
            for other in (*fit.values(), *held_back.values(), self._context.corpus):
                ensure_disjoint(other, text)
        self.library = self._fitted(folder / "library.safetensors", fit, held_back)
        self._masks: dict[tuple[str, Cell], Plan] = {}
        self._accuracies: dict[tuple[str, Plan], dict[str, float]] = {}

    def view(self, repair: str) -> ElasticLLM:
        """Return the model with the stubs of a repair."""
        return self.llm if repair == PLAIN else self.library.attach(self.llm)

    def depends_on(self, repair: str, text: str) -> dict[str, Any]:
        """What a row depends on."""
        return {
            "model_fingerprint": self.llm.fingerprint,
            "dtype": self.llm.facts.dtype,
            "calibration_sha256": self._context.corpus.sha256,
            "report_sha256": self.report[text].sha256,
            "stubs": "" if repair == PLAIN else self.library.sha256,
            "tasks": self._config.evaluate.tasks,
        }

    def row(self, repair: str, cell: Cell, text: str, provenance: dict[str, Any]) -> RepairRow:
        """Measure the mask of a repair and a cell on a text."""
        request = Request.at_fraction(self._context.memory, *cell)
        mask, view = self._mask(repair, cell), self.view(repair)
        store, corpus = self._context.store, self.report[text]
        dense = MaskScorer(self.llm, corpus, store).window_nll(Plan())
        return RepairRow(
            repair=repair,
            request=request_field(cell[:2]),
            budget_fraction=cell[2],
            budget_bytes=request.budget_bytes,
            peak_bytes=MemoryModel(view).peak_bytes(mask, request),
            text=text,
            fitted_on=[] if repair == PLAIN else list(self._config.stubs.fit_texts),
            fit_tokens=0 if repair == PLAIN else int(self.library.provenance["text"]["tokens"]),
            mask=list(mask.removed_names),
            **delta_nll_fields(MaskScorer(view, corpus, store).window_nll(mask) - dense),
            accuracies=self._measured_accuracies(view, mask),
            dense_accuracies=self._measured_accuracies(self.llm, Plan()),
            provenance=provenance,
        )

    def _mask(self, repair: str, cell: Cell) -> Plan:
        """Return the mask of the greedy search with the stubs of a repair, at equal bytes."""
        if (repair, cell) not in self._masks:
            own = self._context
            context = LiveContext(
                self.view(repair), own.corpus, own.store, importance="none", progress=False
            )
            search = make_method("greedy_per_byte", context)
            self._masks[repair, cell] = search.choose(Request.at_fraction(own.memory, *cell))
        return self._masks[repair, cell]

    def _measured_accuracies(self, view: ElasticLLM, mask: Plan) -> dict[str, float]:
        """Return the accuracy of each lm-eval task in [0, 1]; empty without tasks."""
        settings = self._config.evaluate.tasks
        if not settings["names"]:
            return {}
        from rap_env.scoring.tasks import TaskScorer

        key = view.facts.repair, mask
        if key not in self._accuracies:  # the same for all report texts
            scorer = TaskScorer(view, task_config(settings), store=self._context.store)
            self._accuracies[key] = scorer.accuracies(mask)
        return self._accuracies[key]

    def _fitted(
        self, path: Path, fit: Mapping[str, Corpus], held_back: Mapping[str, Corpus]
    ) -> StubLibrary:
        if path.exists():
            library = StubLibrary.load(path)
            library.check(self.llm)
            log.info("Loaded %s.", path)
            return library
        library = fit_library(
            self.llm, Corpus.joined(fit), Corpus.joined(held_back), self._config.stubs.rank,
            progress=self._config.progress,
        )  # fmt: skip
        library.save(path)
        log.info("Wrote %s: %.0f kB per stub.", path, library.nbytes / len(library.stubs) / 1000)
        return library

    def _held_back_part(self, text: TextConfig) -> TextConfig:
        return replace(text, windows=max(_MIN_HELD_BACK, round(text.windows * _HELD_BACK_SHARE)))


def repair_jobs(config: Config, folder: Path) -> Iterator[Job[RepairRow]]:
    """Yield every repair, cell and text; an existing library is not made again."""
    study = RepairStudy(config, folder)
    for row in itertools.product(config.stubs.repairs, config.stubs.parsed_cells, study.report):
        repair, _, text = row
        yield Job(RepairRow, row, study.depends_on(repair, text), partial(study.row, *row))


STUDY = Study(
    "repair",
    "Repair",
    [RepairRow],
    repair_jobs,
    repair_tables,
    data=RepairComparison,
    frozen=(
        "model", "calibration", "stubs.fit_texts", "stubs.report_texts", "stubs.rank",
    ),
)  # fmt: skip
