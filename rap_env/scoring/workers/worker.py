"""What runs in a worker: it holds the model and scores masks and plans on texts that it is sent."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from rap_env.errors import WorkerError
from rap_env.models.device import bound_kernel_caches, use_threads
from rap_env.models.live.elastic import ElasticLLM
from rap_env.plan import MaskOrPlan
from rap_env.scoring.mask_search import find_best_mask
from rap_env.scoring.scorer import MaskScorer
from rap_env.scoring.workers.job import Measured, ScoringJob

OpenModel = Callable[[], ElasticLLM]
"""Loads the model of a worker; must be picklable."""


class ScoringWorker:
    """Scores masks and plans in a process of its own; `WorkerPool` makes it a Ray actor.

    It keeps the scorer of the last text only, and writes no store.

    Args:
        open_model: Loads the model.
        threads: Threads of torch, which rounding depends on.
    """

    def __init__(self, open_model: OpenModel, threads: int) -> None:
        self._open_model = open_model
        self._threads = threads
        self._llm: ElasticLLM | None = None
        self._last: tuple[ScoringJob, MaskScorer] | None = None

    def load(self) -> None:
        """Load the model."""
        bound_kernel_caches()
        use_threads(self._threads)
        self._llm = self._open_model()

    def measure(self, job: ScoringJob, plans: Sequence[MaskOrPlan]) -> Measured:
        """Score masks and plans on the whole text.

        Raises:
            WorkerError: A score here would differ from one of the driver.
            NonFiniteScoreError: The model gave NaN or infinity.
        """
        scorer = self._scorer(job)
        before = scorer.runner.block_runs
        scorer.nll_many(plans)
        return _measured(scorer, plans, before, {})

    def search(
        self, job: ScoringJob, plans: Sequence[MaskOrPlan], near: MaskOrPlan | None
    ) -> Measured:
        """Find the best of some masks or plans as `find_best_mask` does; errors as in `measure`."""
        scorer = self._scorer(job)
        before = scorer.runner.block_runs
        found = find_best_mask(scorer, plans, near=near)
        return _measured(scorer, plans, before, found.lower_bounds)

    def _scorer(self, job: ScoringJob) -> MaskScorer:
        """The scorer of a text: the last one, or a new one."""
        if self._last is None or not job.same_as(self._last[0]):
            assert self._llm is not None  # `load` comes first
            if self._last is not None:
                self._last[1].release()
            tokens = torch.tensor(job.tokens)  # a copy: Ray's arrays are read-only
            scorer = MaskScorer(self._llm, tokens, **job.options)
            _check_context(scorer.context, job.context)
            self._last = job, scorer
        return self._last[1]


def _measured(
    scorer: MaskScorer,
    plans: Sequence[MaskOrPlan],
    runs_before: int,
    lower_bounds: Mapping[MaskOrPlan, float],
) -> Measured:
    known = {plan: values for plan in plans if (values := scorer.look_up(plan)) is not None}
    return Measured(plans, known, lower_bounds, scorer.runner.block_runs - runs_before)


def _check_context(here: Mapping[str, Any], driver: Mapping[str, Any]) -> None:
    """Check that scores of this worker equal those of the driver.

    Raises:
        WorkerError: Something that determines scores differs.
    """
    different = [key for key in driver if here.get(key) != driver[key]]
    if different:
        shown = "; ".join(f"{key}: {here.get(key)!r}, not {driver[key]!r}" for key in different)
        raise WorkerError(
            f"A worker on {platform.node()} would give other scores than this process ({shown}). "
            "All machines need the same model, versions, kind of processor and threads."
        )
