"""``python -m experiments.profile``: measure block importance and memory shares."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

from experiments.config import Config
from experiments.contexts import GSI_FILE, build_context, frontier_artifact, make_ladder_bytes
from experiments.launch import launch
from experiments.score_model import draw_requests, stored_scores
from experiments.study.json_records import write_text
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

    The folder gets ``profile.json``, ``gsi.json``, ``one_shot.json`` and, if
    `frontier.evaluations` is above 0, ``frontier.json``.

    Returns:
        The path of ``profile.json``.

    Raises:
        ExperimentError: The folder has a profile of another model, text or importance.
    """
    run = RunFolder(folder)
    started = time.monotonic()
    path = folder / "profile.json"
    run.start(config, frozen=("model", "calibration", "importance"))
    context = build_context(config, profiled=False)
    if not path.exists():
        context.one_shot.save(folder / "one_shot.json")
        if config.importance.method == "gsi":
            context.gsi.save(folder / GSI_FILE)
        write_text(path, json.dumps(profile_record(context), indent=1, allow_nan=False))
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


def profile_record(context: PruningContext) -> dict[str, Any]:
    """Return what the report shows of a model, as plain values."""
    facts = context.memory.facts
    names = ("name", "fingerprint", "dtype", "num_layers", "max_positions")
    return {
        "facts": {name: getattr(facts, name) for name in names},
        "memory_shares": context.memory.shares(),
        "calibration": context.corpus.provenance,
    }


if __name__ == "__main__":
    launch("profile", profile)
