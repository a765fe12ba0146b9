"""ΔNLL of plans on the texts of a pinned task: measured, or predicted by the task's table.

A plan is measured if the table has its value, if a published entry has it, or if the model
was run for it. What the model gives is kept in a file of its own and never in the table, so
that all train on the same table.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rap_env.context.base import PruningContext
from rap_env.context.opening import require_live
from rap_env.context.table import TableContext
from rap_env.errors import ArtifactError
from rap_env.extras import require_extra
from rap_env.leaderboard.entries import Entry
from rap_env.leaderboard.tasks import SPLITS, PinnedTask
from rap_env.paths import cache_dir
from rap_env.plan import Plan
from rap_env.scoring.corpus import CorpusConfig
from rap_env.scoring.held_out import HeldOutLosses
from rap_env.scoring.score_table import ScoreTable
from rap_env.scoring.store import ScoreStore

if TYPE_CHECKING:
    from rap_env.models.live.elastic import ElasticLLM
    from rap_env.scoring.scorer import PlanScorer

log = logging.getLogger(__name__)

MEASURED_FILE = "measured.sqlite"
"""Name of the score store, in the cache folder, with what the model gave beside tables."""

_METRIC = "delta_nll"  # in that store: one value, nats per token


class Loss(NamedTuple):
    """ΔNLL of a plan on a text, nats per token.

    Attributes:
        measured: What the model gave; None if the plan was not measured.
        predicted: What the task's table predicts; None if the table has measured the plan,
            or the task has none.
    """

    measured: float | None
    predicted: float | None = None

    @property
    def delta_nll(self) -> float:
        """The measured value, else the predicted one."""
        delta_nll = self.predicted if self.measured is None else self.measured
        assert delta_nll is not None  # one of them is known
        return delta_nll


class TaskLosses:
    """ΔNLL of plans on the texts of a pinned task.

    Args:
        task: The pinned task.
        context: The context of its environment: a score table, or the live model.
        entries: The published entries of its comparison.

    Raises:
        StoreError: The file of earlier measurements is damaged.
    """

    def __init__(
        self, task: PinnedTask, context: PruningContext, entries: Sequence[Entry] = ()
    ) -> None:
        self.task, self.context = task, context
        self.table = context.table if isinstance(context, TableContext) else None
        self._published: dict[str, dict[Plan, float]] = {split: {} for split in SPLITS}
        for run in (run for entry in entries for run in entry.runs):
            plans = [*map(Plan.of, run.plans)]
            for split, values in run.delta_nll.items():
                self._published[split] |= dict(zip(plans, values, strict=True))
        self._scorers: dict[str, PlanScorer] = {}

    def text_sha256(self, split: str) -> str:
        """Hash of the tokens of a split's text, in hex.

        Raises:
            ArtifactError: The table has no losses on the test text.
        """
        if self.table is None:
            return self.scorer(split).corpus.sha256
        text = self.table.text if split == "calibration" else self._held_out.text
        return str(text["sha256"])

    def of(self, plan: Plan, split: str) -> Loss:
        """ΔNLL of a plan on a split's text; a task that runs the model measures it.

        Raises:
            ArtifactError: The table has no losses on the test text.
        """
        if self.table is None:
            live = self.scorer(split)
            return Loss(live.nll(plan) - live.native_nll)
        scorer = self.context.scorer
        delta_nll, predicted = scorer.nll(plan) - scorer.native_nll, scorer.is_predicted(plan)
        if split == "test":
            delta_nll = self._held_out.delta_nll(plan, delta_nll)
            predicted = self._held_out.is_predicted(plan)
        return Loss(self._measured(plan, split), delta_nll) if predicted else Loss(delta_nll)

    def _measured(self, plan: Plan, split: str) -> float | None:
        """What was measured beside the table."""
        if plan in self._published[split]:
            return self._published[split][plan]
        if not self._path.exists():
            return None
        values = self._store.get(self._key(split), plan, _METRIC)
        return None if values is None else values[0]

    def measure(self, plans: Iterable[Plan], split: str) -> None:
        """Run the model for those of the plans that were not measured on a split's text.

        Each value is kept as soon as it is there: a run that was killed goes on where it was.

        Raises:
            ArtifactError: The model that was loaded is not that of the table.
            RapError: As loading the model or the text, and scoring do.
        """
        distinct = dict.fromkeys(plans)
        missing = [plan for plan in distinct if self.of(plan, split).measured is None]
        if not missing:
            return
        from rap_env.models.progress import progress_bar

        scorer, key = self.scorer(split), self._key(split)
        log.info("Measuring %d plans on the %s text of %s.", len(missing), split, self.task.name)
        with progress_bar(True, total=len(missing), desc=f"{split} text", unit="plan") as bar:

            def keep(plan: Plan) -> None:
                self._store.put(key, plan, _METRIC, [scorer.nll(plan) - scorer.native_nll])
                bar.update()

            scorer.nll_many(missing, keep)

    def scorer(self, split: str) -> PlanScorer:
        """What runs the model on a split's text.

        Raises:
            ArtifactError: The model that was loaded is not that of the table.
            RapError: As loading the model or the text does.
        """
        if split not in self._scorers:
            self._scorers[split] = self._opened_scorer(split)
        return self._scorers[split]

    def _opened_scorer(self, split: str) -> PlanScorer:
        if self.table is None and split == "calibration":
            return require_live(self.context).scorer
        require_extra("model", f"Measuring plans of {self.task.name}")
        from rap_env.scoring.corpus_loading import load_corpus
        from rap_env.scoring.scorer import PlanScorer

        if self.table is None:
            llm, store = self.context.llm, self.context.store
        else:
            llm, store = _llm_of(self.table), self._store
        return PlanScorer(llm, load_corpus(self._text(split), llm), store)

    def _text(self, split: str) -> CorpusConfig:
        if split == "test" or self.table is None:
            return self.task.test_text_config
        settings = {**self.table.settings["calibration"], "sha256": self.text_sha256(split)}
        return CorpusConfig(**settings)

    def _key(self, split: str) -> dict[str, str]:
        """What determines a measured value beside a table, apart from the plan."""
        assert self.table is not None  # a live context has a store of its own
        return {**self.table.facts.identity, "tokens": self.text_sha256(split)}

    @cached_property
    def _store(self) -> ScoreStore:
        return ScoreStore(self._path)

    @property
    def _path(self) -> Path:
        return cache_dir() / MEASURED_FILE

    @property
    def _held_out(self) -> HeldOutLosses:
        """The losses on the test text of the task's table."""
        if self.table is None or self.table.held_out is None:
            raise ArtifactError(
                f"The table of {self.task.name} has no losses on held-out text; use "
                "split='calibration'."
            )
        return self.table.held_out


def _llm_of(table: ScoreTable) -> ElasticLLM:
    """The model that a table was measured with."""
    from rap_env.models.files.loading import shared_llm

    facts = table.facts
    llm = shared_llm(facts.name, dtype=facts.dtype, weights="native" if facts.packed else "bf16")
    expected, loaded = facts.identity, llm.facts.identity
    if any(loaded.get(name) != value for name, value in expected.items()):
        raise ArtifactError(
            f"{llm.name} was loaded as {loaded}, but the table was measured with {expected}, so "
            "plans cannot be measured beside it; fetch that model, and keep the weights of few "
            "bits that the package's text makes."
        )
    return llm
