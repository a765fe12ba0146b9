"""``python -m experiments.repair``: fit and distil stubs, and measure what they win back."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from agents.baselines.searches import GreedyPerByteBaseline
from experiments.comparison.records import append_record
from experiments.comparison.run_folder import RunFolder, git_state
from experiments.comparison.statistics import bootstrap_mean
from experiments.config import Config
from experiments.config.common import Cell
from experiments.contexts import task_config
from experiments.repair.orders import FILE as ORDERS
from experiments.repair.orders import write_orders
from experiments.repair.rows import RepairRow, row_key
from experiments.repair.setup import RepairBench
from rap_env.blocks import BlockMask
from rap_env.llm.elastic import ElasticLLM
from rap_env.memory import MemoryModel
from rap_env.repair import StubLibrary, fit_for_mask
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
    """One library that is judged.

    Attributes:
        study: As in `RepairRow`.
        repair: As in `RepairRow`.
        fitted_on: Names of the texts it was fitted on.
        library: The stubs; None removes blocks and leaves nothing. For ``per_mask`` those whose
            mask and ranks are taken.
        searched_with: Whose search chose the masks: name and stubs.
    """

    study: str
    repair: str
    fitted_on: list[str]
    library: StubLibrary | None
    searched_with: tuple[str, StubLibrary | None]


def repair(config: Config, folder: Path) -> Path:
    """Make the libraries and compare them; what is there already is not made again.

    Args:
        config: All settings.
        folder: Where libraries and ``repair.jsonl`` go.

    Returns:
        The path of ``repair.jsonl``.

    Raises:
        RapError: A setting cannot be, texts overlap, a budget cannot be met, or a record or
            library is damaged or of another model.
    """
    run, started = RunFolder(folder), time.monotonic()
    run.start(config, frozen=_FROZEN)
    bench = RepairBench(config, folder)
    compared = list(entries(bench))
    judge = Judge(bench)
    rows = judge.rows(compared)
    grid = [entry.repair for entry in compared if entry.study == "grid"]
    orders = {name: bench.importance(name) for name in grid if name != "per_mask"}
    if orders:
        write_orders(folder / ORDERS, orders)
    run.finish(started, rows=len(rows), dense_accuracies=judge.accuracies(bench.llm, BlockMask()))
    log.info("Repair: %d rows in %s.", len(rows), folder / FILE)
    return folder / FILE


def entries(bench: RepairBench) -> Iterator[Entry]:
    """Everything that is compared, in order; libraries are made when they are reached."""
    stubs = bench.config.stubs
    every = list(bench.texts.fit)
    _ = bench.library
    if stubs.distill_steps:
        _ = bench.distilled
    for name in stubs.repairs:
        if name == "distilled" and not stubs.distill_steps:
            continue
        library = bench.stubs_of(name)
        own = ("library", bench.library) if name == "per_mask" else (name, library)
        yield Entry("grid", name, every if name != "none" else [], library, own)
    shared = ("library", bench.library)
    window_tokens = next(iter(bench.texts.fit.values())).tokens.shape[1]
    for tokens in stubs.token_study:
        library = bench.fitted(f"tokens-{tokens}", every, max(1, tokens // window_tokens))
        yield Entry("tokens", "library", every, library, shared)
    least = min(len(bench.texts.fit[name].tokens) for name in stubs.domain_study or every)
    for name in stubs.domain_study:
        library = bench.fitted(f"domain-{name}", [name], least)
        yield Entry("domain", "library", [name], library, shared)
    for name in stubs.alone:
        library = bench.fitted(f"alone-{name}", [name])
        yield Entry("alone", "library", [name], library, (name, library))


class Judge:
    """Chooses masks and measures them on the report texts.

    Args:
        bench: The live parts.
    """

    def __init__(self, bench: RepairBench) -> None:
        self._bench = bench
        self._git = git_state()
        self._path = bench.folder / FILE
        self._masks: dict[tuple[str, Cell], BlockMask] = {}
        self._own_stubs: dict[Cell, StubLibrary] = {}
        self._accuracies: dict[tuple[str, BlockMask], dict[str, float]] = {}

    def rows(self, compared: list[Entry]) -> list[RepairRow]:
        """Rows of all entries on all cells and texts, appended to the file as they are made."""
        found = {row.key: row for row in RepairRow.read(self._path)}
        config = self._bench.config
        bar = tqdm(
            [(entry, cell) for entry in compared for cell in config.stubs.cells_of(entry.study)],
            desc="repair", unit="cell", dynamic_ncols=True,
            disable=None if config.progress else True,
        )  # fmt: skip
        wanted = []
        for entry, cell in bar:
            bar.set_postfix_str(f"{entry.study} {entry.repair}")
            for text in self._bench.texts.report:
                provenance = self._provenance(entry, text)
                key = row_key(entry.study, entry.repair, cell, text, provenance)
                if key not in found:
                    found[key] = self._row(entry, cell, text, provenance)
                    append_record(self._path, found[key].to_record())
                wanted.append(found[key])
        return wanted

    def _row(self, entry: Entry, cell: Cell, text: str, provenance: dict[str, Any]) -> RepairRow:
        request, mask = self._request(cell), self._mask(entry, cell)
        library = self._stubs(entry, cell)
        view = self._bench.view(library)
        dense = self._bench.report[text].window_nll(BlockMask())
        losses = self._scorer(view, text).window_nll(mask) - dense
        loss = bootstrap_mean(losses)
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
            mask=list(mask.names),
            mask_from=entry.searched_with[0],
            loss=loss.mean,
            loss_ci_low=loss.low,
            loss_ci_high=loss.high,
            window_losses=losses.tolist(),
            accuracies=self.accuracies(view, mask) if entry.study == "grid" else {},
            provenance=provenance,
        )

    def _request(self, cell: Cell) -> Request:
        """The request of a cell: its budget is a share of what the dense model needs."""
        return Request.at_fraction(MemoryModel(self._bench.llm), *cell)

    def _mask(self, entry: Entry, cell: Cell) -> BlockMask:
        """What the greedy search finds with the stubs whose search counts, at equal bytes."""
        name, library = entry.searched_with
        if (name, cell) not in self._masks:
            search = GreedyPerByteBaseline(self._bench.context(library))
            self._masks[name, cell] = search.choose(self._request(cell))
        return self._masks[name, cell]

    def _stubs(self, entry: Entry, cell: Cell) -> StubLibrary | None:
        """The stubs that stand in the mask's places; those of one mask are fitted for it."""
        if entry.repair != "per_mask" or entry.library is None:
            return entry.library
        if cell not in self._own_stubs:
            bench = self._bench
            text, held_back = bench.texts.fitted(entry.fitted_on)
            ranks = {index: stub.rank for index, stub in entry.library.stubs.items()}
            self._own_stubs[cell] = fit_for_mask(
                bench.llm,
                self._mask(entry, cell),
                text.spread(min(_PER_MASK_WINDOWS, len(text.tokens))),
                bench.few_held_back(held_back, _PER_MASK_WINDOWS),
                bench.fit_config,
                ranks=ranks,
            )
        return self._own_stubs[cell]

    def _scorer(self, view: ElasticLLM, text: str) -> MaskScorer:
        return MaskScorer(view, self._bench.texts.report[text], self._bench.store)

    def accuracies(self, view: ElasticLLM, mask: BlockMask) -> dict[str, float]:
        """Accuracy of each lm-eval task in [0, 1]; none if none was asked for."""
        settings = self._bench.config.evaluate.tasks
        if not settings.names:
            return {}
        from rap_env.scoring.tasks import TaskScorer

        key = view.facts.repair, mask
        if key not in self._accuracies:  # whatever the text: building a task takes seconds
            scorer = TaskScorer(view, task_config(settings), store=self._bench.store)
            self._accuracies[key] = scorer.accuracies(mask)
        return self._accuracies[key]

    def _provenance(self, entry: Entry, text: str) -> dict[str, Any]:
        """What a row depends on, and the commit."""
        bench = self._bench
        depends_on = {
            "model_fingerprint": bench.llm.fingerprint,
            "dtype": bench.llm.facts.dtype,
            "calibration_sha256": bench.calibration.sha256,
            "report_sha256": bench.texts.report[text].sha256,
            "stubs": "" if entry.library is None else entry.library.sha256,
            "tasks": asdict(bench.config.evaluate.tasks) if entry.study == "grid" else {},
        }
        return {"depends_on": depends_on, "git": self._git}
