"""``python -m experiments.profile``: measure the importance of blocks and plans."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from experiments.config import Config
from experiments.contexts import GSI_FILE, build_context, frontier_artifact, make_ladder_bytes
from experiments.launch import launch
from experiments.score_model import draw_requests, stored_scores
from experiments.study.run_folder import RunFolder
from rap_env.context.base import PruningContext, costs_of
from rap_env.context.opening import require_live
from rap_env.importance.plan_search import PlanSearchConfig, build_plan_table
from rap_env.importance.plan_table import PlanTable
from rap_env.models.progress import progress_bar
from rap_env.scoring.interface import bar_callback

log = logging.getLogger(__name__)


def profile(config: Config, folder: Path) -> Path:
    """Measure importance and write artifacts; existing artifacts are kept.

    The folder gets ``gsi.json``, ``one_shot.json`` and, if `frontier.evaluations` is above 0,
    ``frontier.json``.

    Returns:
        The path of ``one_shot.json``.

    Raises:
        ExperimentError: The folder has a profile of another model, text or importance.
    """
    run = RunFolder(folder)
    started = time.monotonic()
    path = folder / "one_shot.json"
    run.start(config, frozen=("model", "calibration", "importance"))
    context = build_context(config, profiled=False)
    if not path.exists():
        if config.importance.method == "gsi":
            context.gsi.save(folder / GSI_FILE)
        context.one_shot.save(path)
    table = frontier_artifact(config)
    if config.frontier.evaluations and not table.exists():
        build_frontier_table(config, context, table)
    run.finish(started)
    log.info("Importance: %s.", path)
    return path


def build_frontier_table(config: Config, context: PruningContext, path: Path) -> None:
    """Build the table of the best known plans for requests of the workload.

    After a kill, the same command resumes from the score store. Every plan of the ladder that
    the store has of the same model and text becomes part of the table too.
    """
    settings = config.frontier
    ladder_bytes = make_ladder_bytes(config, context)
    start = None
    if settings.start is not None:
        start = PlanTable.load(settings.start, context.memory)
    search = PlanSearchConfig(evaluations=settings.evaluations, seed=config.seed)
    stored = None if context.store is None else stored_scores(context)
    with progress_bar(config.progress, total=settings.evaluations, desc="frontier") as bar:
        table = build_plan_table(
            require_live(context).scorer,
            costs_of(context, ladder_bytes.ladder),
            ladder_bytes,
            draw_requests(config, context, settings.requests),
            search,
            stored,
            bar_callback(bar),
            start,
        )
    table.save(path)
    log.info("Frontier: %d scores in %s.", table.evaluations, path)


if __name__ == "__main__":
    launch("profile", profile)
