"""How good a trained policy is, as one number: what a sweep minimises."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from agents.trained_policy import TrainedPolicy
from experiments.comparison.grid import Choice, choices, grid_requests
from experiments.comparison.run_folder import RunFolder
from experiments.config import Config
from experiments.contexts import held_out_scorer, open_bench
from rap_env.blocks import BlockMask
from rap_env.context.base import PruningContext


class Judge:
    """Judges choices by their loss on the text for choosing.

    That is the calibration text, or ``evaluate.selection`` if given, which no search has seen.

    Args:
        config: All settings.
        context: The model and its calibration text.

    Raises:
        CorpusError: The selection text is too short or overlaps with the calibration text.
        ModelNotAvailableError: There is a selection text, but the model is a score table.
    """

    def __init__(self, config: Config, context: PruningContext) -> None:
        self._on = judged_on(config)
        self._scorer = context.scorer
        if config.evaluate.selection is not None:
            self._scorer = held_out_scorer(config.evaluate.selection, "selection", context)

    def facts(self, found: Sequence[Choice]) -> dict[str, Any]:
        """The mean loss over the grid, nats per token, and what it was measured on.

        Raises:
            NonFiniteScoreError: The model gave NaN or infinity.
        """
        dense_nll = self._scorer.dense_nll
        losses = [self._scorer.nll(BlockMask.of(*c.mask)) - dense_nll for c in found]
        return {"objective": sum(losses) / len(losses), "objective_on": self._on}


def judged_on(config: Config) -> dict[str, Any]:
    """The text and the grid that an objective is the loss on."""
    selection = config.evaluate.selection
    return {
        "text": asdict(selection) if selection is not None else "calibration",
        "requests": list(config.evaluate.requests),
        "budgets": list(config.evaluate.budgets),
    }


def objective(config: Config, folder: Path) -> float:
    """The objective of a finished training; measured again only if it was on another grid or text.

    Raises:
        RapError: As opening the context, the text or the policy does.
    """
    run, started = RunFolder(folder), time.monotonic()
    record = run.read() or {}
    if record.get("objective_on") != judged_on(config):
        context = open_bench(config)
        requests = grid_requests(config.evaluate, context.memory)
        judge = Judge(config, context)
        record = judge.facts(choices(TrainedPolicy.load(folder, context), requests, context))
        run.finish(started, **record)
    return float(record["objective"])
