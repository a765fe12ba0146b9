"""Shared parts of the studies: one model, a context per text, and resumable rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

from agents.baselines.base import CountingPolicy
from experiments.comparison.formatting import Table, markdown, plain, wrapped
from experiments.comparison.records import RowFile, delta_nll_fields, row_key
from experiments.comparison.run_folder import git_state
from experiments.config import Config
from experiments.config.common import Cell, TextConfig
from experiments.contexts import build_context, load_text
from experiments.errors import ExperimentError
from experiments.studies.records import StudyRow
from rap_env.blocks import BlockMask
from rap_env.context.base import PruningContext
from rap_env.context.live import LiveContext
from rap_env.paths import cache_dir
from rap_env.plan import only_mask
from rap_env.request import Request
from rap_env.scoring.corpus import Corpus, ensure_disjoint
from rap_env.scoring.score_table import table_path
from rap_env.scoring.scorer import MaskScorer


class StudyContexts:
    """One model, with its own context and one for each other calibration text.

    Attributes:
        own: The context of the configured calibration text.

    Raises:
        ExperimentError: The model is a score table, which has scores of one text only.
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
        self._git = git_state()

    def load(self, text: TextConfig, role: str) -> Corpus:
        """Load a text for a role."""
        return load_text(text, role, self.own.llm, progress=self.config.progress)

    def on(self, corpus: Corpus, *, importance: str = "gsi") -> LiveContext:
        """Return a context of the same model and store with another calibration text."""
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

    def provenance(self, corpus: Corpus, **depends_on: Any) -> dict[str, Any]:
        """Describe what a record with the calibration text `corpus` depends on, and the commit."""
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
            "git": self._git,
        }


@dataclass
class Search:
    """A method that chooses masks by what it measures on one text, named as in `StudyRow`.

    Attributes:
        context: The model on that text.
        make_policy: Makes the policy from the context; called when the first mask is needed.
        identity: What the choices depend on besides model and text, as plain values.
    """

    method: str
    searched_on: str
    seed: int
    context: PruningContext
    make_policy: Callable[[PruningContext], CountingPolicy]
    identity: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def policy(self) -> CountingPolicy:
        """The policy of the method."""
        return self.make_policy(self.context)

    def choose(self, request: Request) -> tuple[BlockMask, int]:
        """Return the mask for a request, and the evaluations that it needed, setup included."""
        before = self.policy.evaluations
        mask = only_mask(self.policy.choose(request), "Studies compare masks.")
        setup = int(getattr(self.policy, "setup_evaluations", 0))
        return mask, setup + self.policy.evaluations - before


class StudyEvaluator:
    """Evaluates the masks of searches on report texts; existing rows are not computed again.

    Raises:
        CorpusError: A report text shares a run of tokens with a text that is searched on.
    """

    def __init__(
        self,
        study: str,
        contexts: StudyContexts,
        searched: Sequence[Corpus],
        report: Mapping[str, Corpus],
        path: Path,
    ) -> None:
        self._study, self._contexts = study, contexts
        own = contexts.own
        self._report = {name: MaskScorer(own.llm, text, own.store) for name, text in report.items()}
        self.check_disjoint(searched)
        self._file = RowFile(path, StudyRow)

    def check_disjoint(self, searched: Sequence[Corpus]) -> None:
        """Check that the report texts share no run of tokens with texts that are searched on."""
        for text in searched:
            for scorer in self._report.values():
                ensure_disjoint(text, scorer.corpus)

    def rows(self, search: Search, cells: Sequence[Cell]) -> list[StudyRow]:
        """Return a row for each cell and report text; new rows are appended to the file."""
        rows = []
        memory = self._contexts.own.memory
        for cell in cells:
            request = Request.at_fraction(memory, *cell)
            memory.check_feasible(request)
            choose = cache(partial(search.choose, request))  # once for all texts
            for text in self._report:
                provenance = self._provenance(search, text)
                key = row_key(
                    search.method, search.searched_on, search.seed, cell, text, provenance
                )
                compute = partial(self._row, search, cell, request, choose, text, provenance)
                rows.append(self._file.get(key, compute))
        return rows

    def _row(
        self,
        search: Search,
        cell: Cell,
        request: Request,
        choose: Callable[[], tuple[BlockMask, int]],
        text: str,
        provenance: dict[str, Any],
    ) -> StudyRow:
        mask, evaluations = choose()
        scorer, report = search.context.scorer, self._report[text]
        return StudyRow(
            study=self._study,
            method=search.method,
            searched_on=search.searched_on,
            seed=search.seed,
            tokens=search.context.corpus.tokens.numel(),
            request={"batch_size": cell[0], "seq_len_tokens": cell[1]},
            budget_fraction=cell[2],
            budget_bytes=request.budget_bytes,
            peak_bytes=self._contexts.own.memory.peak_bytes(mask, request),
            mask=list(mask.names),
            loss_calibration=float(scorer.nll(mask) - scorer.dense_nll),
            text=text,
            **delta_nll_fields(report.window_nll(mask) - report.window_nll(BlockMask())),
            evaluations=evaluations,
            provenance=provenance,
        )

    def _provenance(self, search: Search, text: str) -> dict[str, Any]:
        return self._contexts.provenance(
            search.context.corpus,
            report_sha256=self._report[text].corpus.sha256,
            **search.identity,
        )


def captioned_tables(title: str, parts: Sequence[tuple[str, Table]]) -> tuple[str, str]:
    """Return tables with their captions, in Markdown and for the terminal."""
    in_markdown = [f"{caption}\n\n{markdown(table)}" for caption, table in parts]
    in_terminal = [f"{plain(table)}\n\n{wrapped(caption)}" for caption, table in parts]
    return "\n".join([f"# {title}\n", *in_markdown]), "\n\n".join(in_terminal)


def gsi_identity(config: Config) -> dict[str, Any]:
    """Settings of GSI that its orders depend on."""
    settings = config.importance
    return {"gsi_method": settings.gsi_method, "gsi_removals": settings.gsi_removals}


def reseeded(text: TextConfig, seed: int, windows: int | None = None) -> TextConfig:
    """Return the same text with another seed, and optionally another number of windows."""
    return replace(text, seed=seed, windows=windows or text.windows)
