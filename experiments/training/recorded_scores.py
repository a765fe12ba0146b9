"""Scores that comparisons measured earlier, read from their records."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from experiments.comparison.records import ResultRow, rows_below
from experiments.contexts import FRONTIER_FILE
from experiments.study.errors import ExperimentError
from experiments.study.records import read_records
from experiments.training.score_model import ROUNDS_FILE, native_shift, scored_masks
from rap_env.context.base import PruningContext
from rap_env.importance.plan_table import PlanTable
from rap_env.plan import Plan
from rap_env.scoring.held_out import HeldOutLosses

Folders = Sequence[str | os.PathLike[str]]


def recorded_scores(folders: Folders, context: PruningContext) -> dict[Plan, float]:
    """Return the mean NLL of all plans that comparisons recorded, nats per token.

    So that scores of several machines go together, each has its own rise; see `native_shift`.

    Args:
        folders: Folders of comparisons, with the table of their profile, their training runs, or
            their evaluation.
        context: The model and text that they must have been measured with.

    Raises:
        ExperimentError: A folder has no scores, or they were measured on another text.
        ArtifactError: A table is of another model, or damaged.
    """
    nll_by_plan: dict[Plan, float] = {}
    for folder in map(Path, folders):
        own = _table_scores(folder, context)
        for row in _rows(folder, context):
            own.setdefault(row.plan, row.calibration_delta_nll + context.scorer.dense_nll)
        if not own:
            raise ExperimentError(
                f"{folder} has no recorded scores of this model and calibration text."
            )
        nll_by_plan |= own
    return nll_by_plan


def _table_scores(folder: Path, context: PruningContext) -> dict[Plan, float]:
    """Return the scores of a comparison's table and training runs; none without a table."""
    path = folder / "profile" / FRONTIER_FILE
    if not path.is_file():
        return {}
    table = PlanTable.load(path, context.memory)
    shift = native_shift(table, str(path), context)
    nll_by_plan = dict(table.scores)
    for path in sorted(folder.glob(f"train/*/{ROUNDS_FILE}")):
        for record in read_records(path):
            nll_by_plan |= scored_masks(record)
    return {plan: nll + shift for plan, nll in nll_by_plan.items()}


def held_out_losses(folders: Folders, context: PruningContext) -> HeldOutLosses | None:
    """Return what the plans of some comparisons lose on the held-out text that most of them report.

    Args:
        folders: As for `recorded_scores`.
        context: The model and calibration text of the comparisons.

    Returns:
        None if no plan was evaluated.

    Raises:
        ArtifactError: There are too few plans to predict others.
    """
    rows = [row for folder in map(Path, folders) for row in _rows(folder, context)]
    texts = Counter(row.depends_on["report_sha256"] for row in rows)
    if not texts:
        return None
    text = texts.most_common(1)[0][0]
    rows = [row for row in rows if row.depends_on["report_sha256"] == text]
    losses = {row.plan: row.delta_nll for row in rows}
    calibration = {row.plan: row.calibration_delta_nll for row in rows}
    provenance = rows[0].depends_on["report_text"]
    return HeldOutLosses.fitted(provenance, losses, calibration, context.memory.facts.num_blocks)


def _rows(folder: Path, context: PruningContext) -> list[ResultRow]:
    """Return a comparison's rows of the same model and calibration text."""
    facts, here = context.memory.facts, context.corpus.sha256
    own = {
        "model_fingerprint": facts.fingerprint, "calibration_sha256": here, "repair": facts.repair
    }  # fmt: skip
    return [row for row in rows_below(folder) if own.items() <= row.depends_on.items()]
