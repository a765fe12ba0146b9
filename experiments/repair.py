"""``python -m experiments.repair``: fit stubs, and measure how much ΔNLL they recover."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt

from experiments.config import Config
from experiments.config.common import parse_cell
from experiments.contexts import build_context, load_texts, task_config
from experiments.launch import launch
from experiments.study.experiment_errors import ExperimentError
from experiments.study.harness import Job, Study
from experiments.study.json_records import Cell, CellRecord, delta_nll_fields, request_field
from experiments.study.looks import look, rank
from experiments.study.statistics import Estimate, stratified_mean
from experiments.study.table_format import (
    Table,
    TitledTable,
    mebibytes,
    number,
    percent,
    shape_words,
)
from rap_env.context.live import LiveContext
from rap_env.errors import counted
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

PLAIN = "none"
"""The repair that is none."""

ARROW = " \N{RIGHTWARDS ARROW} "

_MIN_HELD_BACK = 4  # windows of each text
_HELD_BACK_SHARE = 0.25  # of the windows fitted on, to choose ranks and penalties


@dataclass(frozen=True)
class RepairRow(CellRecord):
    """One repair, request, budget and report text; masks are repaired with the stubs.

    Attributes:
        repair: One of `REPAIRS`.
        text: Name of the report text.
        fitted_on: Names of the texts that stubs were fitted on; empty without stubs.
        fit_tokens: Number of tokens of those texts.
        mask: Names of the removed blocks.
        accuracies: Accuracy of each lm-eval task in [0, 1] under the mask; the same for all texts,
            empty without tasks.
        dense_accuracies: The same of the dense model.
    """

    file = "repair.jsonl"
    record_name = "A repair record"
    rerun = "make it again"
    identity = ("repair", "cell", "text")

    repair: str
    text: str
    fitted_on: list[str]
    fit_tokens: int
    mask: list[str]
    accuracies: dict[str, float] = field(default_factory=dict)
    dense_accuracies: dict[str, float] = field(default_factory=dict)


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
        parts = {
            name: replace(text, windows=max(_MIN_HELD_BACK, round(text.windows * _HELD_BACK_SHARE)))
            for name, text in stubs.fit_texts.items()
        }
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
        """The model with the stubs of a repair."""
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

    def row(self, repair: str, cell: Cell, text: str) -> RepairRow:
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
        from rap_env.scoring.tasks import TaskScorer  # lm-eval is an extra

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
            self.llm,
            Corpus.concatenated(fit),
            Corpus.concatenated(held_back),
            self._config.stubs.rank,
            progress=self._config.progress,
        )
        library.save(path)
        log.info("Wrote %s: %.0f kB per stub.", path, library.nbytes / len(library.stubs) / 1000)
        return library


def repair_jobs(config: Config, folder: Path) -> Iterator[Job[RepairRow]]:
    """Yield every repair, cell and text; an existing library is not made again."""
    study = RepairStudy(config, folder)
    cells = map(parse_cell, config.stubs.cells)
    for row in itertools.product(config.stubs.repairs, cells, study.report):
        repair, _, text = row
        yield Job(RepairRow, row, study.depends_on(repair, text), partial(study.row, *row))


class RepairComparison:
    """All rows of the study.

    Attributes:
        rows: A row for each measurement; of several of the same, the last.
    """

    def __init__(self, rows: Iterable[RepairRow]) -> None:
        self._rows = {(row.repair, row.cell, row.text): row for row in rows}
        self.rows = list(self._rows.values())

    @cached_property
    def repairs(self) -> list[str]:
        """Repairs in the order of legends."""
        return sorted({row.repair for row in self.rows}, key=lambda r: (rank(r), r))

    @cached_property
    def texts(self) -> list[str]:
        """Report texts: those of fitted domains first, otherwise in the order of the rows."""
        return sorted(dict.fromkeys(row.text for row in self.rows), key=self.is_other)

    def is_other(self, text: str) -> bool:
        """Whether no stub was fitted on text of this domain."""
        return not any(text in row.fitted_on for row in self.rows)

    @cached_property
    def cells(self) -> list[Cell]:
        """Cells: small requests first, each from large to small budgets."""
        return sorted({row.cell for row in self.rows}, key=lambda c: (c[0] * c[1], c[0], -c[2]))

    def at(self, repair: str, cell: Cell, text: str) -> RepairRow | None:
        """The row of a measurement, or None."""
        return self._rows.get((repair, cell, text))

    def of(self, repair: str) -> list[RepairRow]:
        """Rows of a repair."""
        return [row for row in self.rows if row.repair == repair]

    def on(self, repair: str, *, other: bool) -> list[RepairRow]:
        """Rows of a repair on texts of fitted domains or of other domains."""
        return [row for row in self.of(repair) if self.is_other(row.text) == other]

    def ratio(self, rows: Sequence[RepairRow]) -> Estimate | None:
        """Mean ΔNLL over rows, divided by that without stubs on the same cells and texts.

        Rows whose cell and text were not measured without stubs are left out.

        Returns:
            The ratio with a 95 % interval, windows resampled jointly; None without rows, or if
            the ΔNLL without stubs is not significantly above 0.
        """
        pairs = [(row, plain) for row in rows if (plain := self.at(PLAIN, row.cell, row.text))]
        if not pairs:
            return None
        repaired, unrepaired = map(_by_text, zip(*pairs, strict=True))
        return stratified_mean(repaired, divided_by=unrepaired)


def mean_delta_nll(rows: Sequence[RepairRow]) -> Estimate | None:
    """Mean ΔNLL over rows, the windows of each text resampled; None without rows."""
    return stratified_mean(_by_text(rows)) if rows else None


def _by_text(rows: Sequence[RepairRow]) -> list[npt.NDArray[np.float64]]:
    """Sum of the window ΔNLL of each text's rows, divided by the number of all rows, (windows,)."""
    return [
        np.sum([row.window_delta_nll for row in rows if row.text == text], axis=0) / len(rows)
        for text in dict.fromkeys(row.text for row in rows)
    ]


def repair_tables(data: RepairComparison) -> list[TitledTable]:
    """Every table that there are rows for."""
    tables = [
        TitledTable(_summary_table(data), caption=_summary_caption(data)),
        TitledTable(_grid_table(data), "ΔNLL at each request and budget", _grid_caption(data)),
        TitledTable(_accuracy_table(data), "Accuracy of each task, mean over the cells"),
    ]
    return [part for part in tables if part.table[1]]


def _summary_table(data: RepairComparison) -> Table:
    """One row per repair: mean ΔNLL and ratio on texts of fitted domains and on others."""
    header = ["Repair", "ΔNLL, fitted", "Ratio", "ΔNLL, other", "Ratio", "Accuracy", "Tokens",
              "Fits"]  # fmt: skip
    lines = []
    for repair in data.repairs:
        line = [look(repair).label]
        for other in (False, True):
            rows = data.on(repair, other=other)
            delta_nll = mean_delta_nll(rows)
            line += [f"{delta_nll.mean:.3f}" if delta_nll else "-", _ratio(data.ratio(rows))]
        by_cell = {row.cell: row for row in data.of(repair)}
        measured = [list(row.accuracies.values()) for row in by_cell.values() if row.accuracies]
        fitting = sum(row.peak_bytes <= row.budget_bytes for row in by_cell.values())
        lines.append([
            *line,
            percent(fmean(map(fmean, measured)) if measured else None),
            number(max(row.fit_tokens for row in by_cell.values())),
            f"{fitting}/{len(by_cell)}",
        ])  # fmt: skip
    return header, lines


def _summary_caption(data: RepairComparison) -> str:
    windows = sum({row.text: len(row.window_delta_nll) for row in data.rows}.values())
    cells, texts = counted(len(data.cells), "cell"), counted(len(data.texts), "text")
    return (
        f"Mean ΔNLL in nats/token over {cells} (a request at a budget) and {texts}. Fitted: "
        "held-out text of the domains that stubs "
        "were fitted on; other: texts of other domains. Ratio: mean ΔNLL divided by that without "
        "stubs; lower is better, 1 means no recovery. Intervals are 95 % percentile bootstrap over "
        f"{windows} windows of report text, resampled jointly for both values of a ratio. Tokens: "
        "tokens that stubs were fitted on. Fits: masks within their budget."
    )


def _grid_table(data: RepairComparison) -> Table:
    """One line per request and budget: ΔNLL of all repairs on each text, and removed blocks."""
    labels = [f"{t} (not fitted on)" if data.is_other(t) else t for t in data.texts]
    lines = []
    for cell in data.cells:
        by_text = [[data.at(repair, cell, text) for repair in data.repairs] for text in data.texts]
        # The mask is the same on all texts.
        by_repair = [next(filter(None, rows), None) for rows in zip(*by_text, strict=True)]
        size = next(row.budget_bytes for row in by_repair if row)
        lines.append([
            shape_words(cell),
            f"{percent(cell[2], 0)} ({mebibytes(size)})",
            *(_chain([f"{row.delta_nll:.2f}" if row else "-" for row in rows]) for rows in by_text),
            _chain([_removed(row) for row in by_repair]),
        ])  # fmt: skip
    return ["Request", "Budget", *labels, "Blocks removed"], lines


def _grid_caption(data: RepairComparison) -> str:
    chain = _chain([look(repair).label for repair in data.repairs])
    return (
        f"ΔNLL in nats/token; each cell holds: {chain}. Removed blocks (attn+ffn) are in the same "
        "order, given once if equal. Each repair has its own mask, found by greedy search at the "
        f"same budget, stubs included."
    )


def _accuracy_table(data: RepairComparison) -> Table:
    """Mean accuracy of each task over the cells; no rows without tasks."""
    rows = [row for row in data.rows if row.accuracies]
    tasks = sorted({task for row in rows for task in row.accuracies})
    dense = [row.dense_accuracies for row in rows if row.dense_accuracies]
    measured = {"Dense model": dense[:1]} | {
        look(repair).label: list(
            {r.cell: r.accuracies for r in rows if r.repair == repair}.values()
        )
        for repair in data.repairs
    }
    lines = []
    for name, cells in measured.items():
        if cells:
            means = [fmean(cell[task] for cell in cells) for task in tasks]
            lines.append([name, *map(percent, [*means, fmean(means)])])
    return ["Repair", *tasks, "mean"], lines


def _ratio(ratio: Estimate | None) -> str:
    """A ratio with its interval, or a dash; the reference itself is 1 without an interval."""
    if not ratio:
        return "-"
    if ratio.low == ratio.high == 1:
        return "1"
    return f"{ratio.mean:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"


def _chain(parts: Sequence[str]) -> str:
    """The common value of all repairs, or else their values in order."""
    return parts[0] if len(set(parts)) == 1 else ARROW.join(parts)


def _removed(row: RepairRow | None) -> str:
    if not row:
        return "-"
    attn = sum(name.endswith(".attn") for name in row.mask)
    return f"{attn}+{len(row.mask) - attn}"


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

if __name__ == "__main__":
    launch(STUDY.name, STUDY.run)
