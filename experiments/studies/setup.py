"""The live parts of the studies of calibration text: one model, many texts, rows that resume."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from agents.baselines import BASELINES, Baseline
from agents.baselines.base import CountingPolicy
from experiments.comparison.records import append_record
from experiments.comparison.run_folder import git_state
from experiments.comparison.statistics import bootstrap_mean
from experiments.config import Config, TextConfig
from experiments.config.common import Cell
from experiments.contexts import build_context
from experiments.errors import ExperimentError
from experiments.studies.rows import StudyRow, row_key
from rap_env.blocks import BlockMask
from rap_env.context.base import PruningContext
from rap_env.context.live import LiveContext
from rap_env.paths import cache_dir
from rap_env.request import Request
from rap_env.scoring.corpus import Corpus, CorpusConfig, ensure_disjoint, load_corpus
from rap_env.scoring.score_table import table_path
from rap_env.scoring.scorer import MaskScorer

Maker = Callable[[PruningContext], tuple[CountingPolicy, int]]
"""From a context: what chooses masks, and the evaluations that it needed beforehand."""


class StudyBench:
    """The model with its calibration text, and a context for each other text.

    Args:
        config: All settings.

    Raises:
        ExperimentError: The model is a score table, which knows one text only.
        RapError: As loading the model, the text, the stubs or the store does.
    """

    def __init__(self, config: Config) -> None:
        if table_path(config.model.name) is not None:
            raise ExperimentError(
                f"experiments.{config.stage} measures masks on several texts, but model.name is "
                f"{config.model.name}, which has scores of one; give the model itself."
            )
        self.config = config
        self.own = build_context(config, profiled=False)
        self.git = git_state()

    def load(self, text: TextConfig, role: str) -> Corpus:
        """A text for a role."""
        corpus = CorpusConfig(**asdict(text), role=role)
        return load_corpus(corpus, self.own.llm, progress=self.config.progress)

    def load_all(self, texts: Mapping[str, TextConfig], role: str) -> dict[str, Corpus]:
        """Texts by name. What the model has to write comes last: a bad path is told at once."""
        files_first = sorted(texts.items(), key=lambda item: item[1].source == "self")
        found = {name: self.load(text, role) for name, text in files_first}
        return {name: found[name] for name in texts}

    def on(self, corpus: Corpus, *, importance: str = "gsi") -> PruningContext:
        """The same model and store with another text to search on."""
        settings = self.config.importance
        return LiveContext(
            self.own.llm,
            corpus,
            self.own.store,
            importance=importance,
            gsi_removals=settings.gsi_removals,
            gsi_method=settings.gsi_method,
            folder=cache_dir() / "importance",
            progress=self.config.progress,
        )

    def request(self, cell: Cell) -> Request:
        """The request of a cell: its budget is a share of what the dense model needs.

        Raises:
            InvalidRequestError: The batch or the length does not suit the model.
            InfeasibleBudgetError: The budget is below what any mask can reach.
        """
        request = Request.at_fraction(self.own.memory, *cell)
        self.own.memory.check_feasible(request)
        return request

    def provenance(self, corpus: Corpus, **depends_on: Any) -> dict[str, Any]:
        """What a record that was made on `corpus` depends on, and the commit."""
        facts = self.own.memory.facts
        hashes = {
            "model_fingerprint": facts.fingerprint,
            "dtype": facts.dtype,
            "repair": facts.repair,
            "calibration_sha256": corpus.sha256,
        }
        return {
            "depends_on": {**hashes, **depends_on},
            "searched_on": corpus.provenance,
            "git": self.git,
        }


@dataclass
class Search:
    """A way to choose masks that looks at one text.

    Attributes:
        method: As in `StudyRow`.
        searched_on: As in `StudyRow`.
        seed: As in `StudyRow`.
        context: The model on that text.
        maker: Makes what chooses; called when the first mask is needed.
        identity: What its choices depend on beside model and text, as plain values.
    """

    method: str
    searched_on: str
    seed: int
    context: PruningContext
    maker: Maker
    identity: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def made(self) -> tuple[CountingPolicy, int]:
        """What chooses, and the evaluations that it needed beforehand."""
        return self.maker(self.context)

    def choose(self, request: Request) -> tuple[BlockMask, int]:
        """The mask for a request, and the evaluations that it needed."""
        policy, beforehand = self.made
        before = policy.evaluations
        mask = policy.choose(request)
        return mask, beforehand + policy.evaluations - before


class Judge:
    """Judges the masks of searches on report texts; rows that are there are not made again.

    Args:
        study: Name of the study.
        bench: The live parts.
        report: Report texts by name.
        path: The file of the rows.
    """

    def __init__(
        self, study: str, bench: StudyBench, report: Mapping[str, Corpus], path: Path
    ) -> None:
        self._study, self._bench, self._path = study, bench, path
        own = bench.own
        self._report = {name: MaskScorer(own.llm, text, own.store) for name, text in report.items()}
        self._found = {row.key: row for row in StudyRow.read(path)}

    def rows(self, search: Search, cells: Sequence[Cell]) -> list[StudyRow]:
        """A row for each cell and report text."""
        wanted = []
        for cell in cells:
            chosen: tuple[BlockMask, int] | None = None
            request = self._bench.request(cell)
            for text in self._report:
                provenance = self._provenance(search, text)
                key = row_key(
                    search.method, search.searched_on, search.seed, cell, text,
                    provenance["depends_on"],
                )  # fmt: skip
                if key not in self._found:
                    chosen = chosen or search.choose(request)
                    row = self._row(search, cell, request, chosen, text, provenance)
                    append_record(self._path, row.to_record())
                    self._found[key] = row
                wanted.append(self._found[key])
        return wanted

    def _row(
        self,
        search: Search,
        cell: Cell,
        request: Request,
        chosen: tuple[BlockMask, int],
        text: str,
        provenance: dict[str, Any],
    ) -> StudyRow:
        mask, evaluations = chosen
        scorer, report = search.context.scorer, self._report[text]
        losses = report.window_nll(mask) - report.window_nll(BlockMask())
        loss = bootstrap_mean(losses)
        return StudyRow(
            study=self._study,
            method=search.method,
            searched_on=search.searched_on,
            seed=search.seed,
            tokens=search.context.corpus.tokens.numel(),
            request={"batch_size": cell[0], "seq_len_tokens": cell[1]},
            budget_fraction=cell[2],
            budget_bytes=request.budget_bytes,
            peak_bytes=self._bench.own.memory.peak_bytes(mask, request),
            mask=list(mask.names),
            loss_calibration=float(scorer.nll(mask) - scorer.dense_nll),
            text=text,
            loss=loss.mean,
            loss_ci_low=loss.low,
            loss_ci_high=loss.high,
            window_losses=np.asarray(losses, dtype=float).tolist(),
            evaluations=evaluations,
            provenance=provenance,
        )

    def _provenance(self, search: Search, text: str) -> dict[str, Any]:
        return self._bench.provenance(
            search.context.corpus,
            report_sha256=self._report[text].corpus.sha256,
            **search.identity,
        )


def baseline_maker(method: str, **others: type[Baseline]) -> Maker:
    """Makes the baseline of that name.

    Args:
        method: One of `agents.baselines.BASELINES`, or of `others`.
        **others: Baselines of one study alone, by name.
    """

    def make(context: PruningContext) -> tuple[CountingPolicy, int]:
        baseline = {**BASELINES, **others}[method](context)
        return baseline, baseline.setup_evaluations

    return make


def gsi_identity(config: Config) -> dict[str, Any]:
    """How GSI is measured: its orders depend on it."""
    settings = config.importance
    return {"gsi_method": settings.gsi_method, "gsi_removals": settings.gsi_removals}


def reseeded(text: TextConfig, seed: int, windows: int | None = None) -> TextConfig:
    """The same text with another seed, and another number of windows where one is given."""
    return replace(text, seed=seed, windows=windows or text.windows)


def all_disjoint(searched_on: Sequence[Corpus], report: Sequence[Corpus]) -> None:
    """Refuse report texts that share a run of tokens with any text that is searched on.

    Raises:
        CorpusError: One does.
    """
    for other in searched_on:
        for text in report:
            ensure_disjoint(other, text)


def bar(config: Config, stage: str, searches: Sequence[Any]) -> tqdm[Any]:
    """The one progress bar of a study."""
    return tqdm(
        searches, desc=stage, unit="search", dynamic_ncols=True,
        disable=None if config.progress else True,
    )  # fmt: skip
