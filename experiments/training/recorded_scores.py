"""Scores that comparisons measured earlier, read from their records."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from experiments.comparison.records import read_records
from experiments.contexts import FRONTIER_FILE
from experiments.errors import ExperimentError
from experiments.training.score_model import ROUNDS_FILE, scored_masks
from rap_env.artifacts import artifact_kind
from rap_env.context.base import PruningContext
from rap_env.importance.frontier import Frontier
from rap_env.importance.plan_frontier import PlanFrontier
from rap_env.plan import MaskOrPlan


def recorded_scores(
    folders: Sequence[str | os.PathLike[str]], context: PruningContext
) -> dict[MaskOrPlan, float]:
    """Return the mean NLL of all masks and plans that comparisons recorded, nats per token.

    Args:
        folders: Folders of comparisons, with the table of their profile and their training runs.
        context: The model and text that they must have been measured with.

    Raises:
        ExperimentError: A folder has no table, or it was measured on another text.
        ArtifactError: A table is of another model, or damaged.
    """
    found: dict[MaskOrPlan, float] = {}
    for folder in map(Path, folders):
        path = folder / "profile" / FRONTIER_FILE
        if not path.is_file():
            raise ExperimentError(f"{folder} has no recorded scores: there is no {path}.")
        kind = PlanFrontier if artifact_kind(path) == PlanFrontier.KIND else Frontier
        table = kind.load(path, context.memory)
        measured, here = table.provenance["scoring"]["tokens"], context.corpus.sha256
        if measured != here:
            raise ExperimentError(
                f"{folder} was measured on other text (SHA-256 {measured[:12]}) than the "
                f"calibration text ({here[:12]}); use its settings of the calibration text."
            )
        found.update(table.scores.items())
        for path in sorted(folder.glob(f"train/*/{ROUNDS_FILE}")):
            for record in read_records(path):
                found |= scored_masks(record)
    return found
