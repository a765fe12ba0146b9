"""``python -m experiments.export_scores``: write a score table, to train without the model.

The table has the scores that the store has of the model on the calibration text, and the
importance that agents observe: ``python -m experiments.profile frontier.evaluations=3000``
measures plans. ``export.records=[results/tight]`` adds the scores that a
comparison recorded, so that nothing is measured twice, and what its plans lose on held-out
text. ``export.levels=true model.weights=native`` adds what ``RAPLadder-v0`` needs: the costs
of levels, which are measured unless the package or the cache has them, and the scores of
plans.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from experiments.comparison.result_rows import ResultRow, rows_below
from experiments.comparison.run_records import TABLE_FILE
from experiments.config import Config
from experiments.contexts import FRONTIER_FILE, build_context
from experiments.launch import launch
from experiments.score_model import (
    ROUNDS_FILE,
    native_shift,
    scored_masks,
    stored_scores,
    table_of,
)
from experiments.study.console import ExperimentError, say
from experiments.study.json_records import read_records
from experiments.study.run_folder import RunFolder
from experiments.study.table_format import columns_table, plain
from rap_env.context.base import PruningContext
from rap_env.importance.plan_table import PlanTable
from rap_env.ladder.items import Ladder
from rap_env.plan import Plan
from rap_env.scoring.fidelity import Fidelity, FidelityRow
from rap_env.scoring.held_out import HeldOutLosses

Folders = Sequence[str | os.PathLike[str]]

log = logging.getLogger(__name__)


def export_scores(config: Config, folder: Path) -> Path:
    """Write a score table, and print how well it predicts.

    Returns:
        The table's path.
    """
    run, started = RunFolder(folder), time.monotonic()
    context = build_context(config)
    recorded = recorded_scores(config.export.records, context)
    _check(context, recorded)
    run.start(config, frozen=("model", "calibration", "importance", "seed"))
    _ = context.one_shot, context.features  # measured first, because the table contains them
    everything = Ladder.of(context.memory.facts, "all")
    levels = context.level_costs(everything) if config.export.levels else None
    # Machines differ in the last digits: what was published keeps its rise over the native
    # model.
    scores = stored_scores(context) | recorded
    if levels is None:
        scores = {plan: nll for plan, nll in scores.items() if plan.is_mask}
    held_out = held_out_losses(config.export.records, context)
    table = table_of(config, context, scores, levels=levels, held_out=held_out)
    path = Path(config.export.path) if config.export.path else folder / TABLE_FILE
    table.save(path)
    run.finish(started, masks=len(table.scores), fidelity=asdict(table.fidelity))
    say(shown(table.fidelity))
    if held_out is not None:
        say(f"On held-out text ({len(held_out.measured):,} measured):")
        say(shown(held_out.fidelity))
    say(f"{len(table.scores):,} masks in {path}. Use the table as model.name=score_table:{path}")
    return path


def shown(fidelity: Fidelity) -> str:
    """Return the agreement on held-out plans as a text table."""

    def share(value: float | None, shape: str) -> str:
        return "-" if value is None else format(value, shape)

    columns: dict[str, Callable[[FidelityRow], str]] = {
        "removed": lambda group: group.removed,
        "masks": lambda group: f"{group.masks:,}",
        "rank correlation": lambda group: share(group.spearman, ".4f"),
        "mean error (nats)": lambda group: share(group.mean_error, ".3f"),
        "relative error": lambda group: share(group.median_relative_error, ".1%"),
    }
    held_out = fidelity.rows[0].masks
    title = f"Fidelity on {held_out:,} masks held out, fitted to {fidelity.fitted:,} others"
    return f"{title}\n{plain(columns_table(fidelity.rows, columns))}"


def recorded_scores(folders: Folders, context: PruningContext) -> dict[Plan, float]:
    """Return the mean NLL of all plans that comparisons recorded, nats per token.

    So that scores of several machines go together, each has its own rise; see `native_shift`.

    Args:
        folders: Folders of comparisons, with the table of their profile, their training runs,
            or their evaluation.
        context: The model and text that they must have been measured with.

    Raises:
        ExperimentError: A folder has no scores, or they were measured on another text.
        ArtifactError: A table is of another model, or damaged.
    """
    nll_by_plan: dict[Plan, float] = {}
    for folder in map(Path, folders):
        own = _table_scores(folder, context)
        for row in _rows(folder, context):
            own.setdefault(row.plan, row.calibration_delta_nll + context.scorer.native_nll)
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
    own = {"model_fingerprint": facts.fingerprint, "calibration_sha256": here}
    return [row for row in rows_below(folder) if own.items() <= row.depends_on.items()]


def _check(context: PruningContext, recorded: Mapping[Plan, float]) -> None:
    """Check that a table can be made, before anything is measured.

    Raises:
        ExperimentError: There is no store, or neither it nor the records have scores.
    """
    if context.store is None:
        raise ExperimentError(
            "A score table is made from a score store, but store is null. Set store=default or "
            "store=FILE."
        )
    if not recorded and not stored_scores(context):
        raise ExperimentError(
            f"The store {context.store.path} has no scores of {context.llm.name} on this "
            "calibration text, dtype, device and number of threads. Measure plans with `python -m "
            "experiments.profile frontier.evaluations=3000`, or use the settings that the scores "
            "were measured with."
        )


if __name__ == "__main__":
    launch("export_scores", export_scores)
