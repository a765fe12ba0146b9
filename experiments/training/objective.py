"""The objective that a sweep minimises: mean ΔNLL of what a policy chooses on text of its own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from agents.trained_policy import TrainedPolicy
from experiments.comparison.evaluation import grid_requests
from experiments.config import Config
from experiments.contexts import build_context, held_out_scorer, ladder_bytes
from experiments.study.run_folder import RunFolder
from rap_env.context.base import PruningContext
from rap_env.plan import Plan


class ObjectiveScorer:
    """Computes a sweep's objective: mean ΔNLL of the chosen masks on the selection text.

    The selection text is ``evaluate.selection``, or the calibration text where none is given.

    Raises:
        CorpusError: The selection text is too short or overlaps with the calibration text.
        ModelNotAvailableError: There is a selection text, but the model is a score table.
    """

    def __init__(self, config: Config, context: PruningContext) -> None:
        self._on = measured_on(config)
        self._scorer = context.scorer
        selection = config.evaluate.selection_text
        if selection is not None:
            self._scorer = held_out_scorer(selection, "selection", context)

    def facts(self, plans: Sequence[Plan]) -> dict[str, Any]:
        """Return the mean ΔNLL over the grid, nats per token, and what it was measured on."""
        dense_nll = self._scorer.dense_nll
        losses = [self._scorer.nll(plan) - dense_nll for plan in plans]
        return {"objective": sum(losses) / len(losses), "objective_on": self._on}


def measured_on(config: Config) -> dict[str, Any]:
    """Return the text and the grid that an objective is measured on."""
    selection = config.evaluate.selection_text
    pinned = {"pinned": list(config.evaluate.pinned)} if config.evaluate.pinned else {}
    return {
        "text": asdict(selection) if selection is not None else "calibration",
        "requests": list(config.evaluate.requests),
        "budgets": list(config.evaluate.budgets),
        **pinned,
    }


def objective(config: Config, folder: Path) -> float:
    """Return the objective of a finished training; measured again if grid or text differ."""
    run, started = RunFolder(folder), time.monotonic()
    record = run.read() or {}
    if record.get("objective_on") != measured_on(config):
        context = build_context(config)
        requests = grid_requests(config.evaluate, context.memory, ladder_bytes(config, context))
        scorer, policy = ObjectiveScorer(config, context), TrainedPolicy.load(folder, context)
        record = scorer.facts([policy.choose(request) for _, request in requests])
        run.finish(started, **record)
    return float(record["objective"])
