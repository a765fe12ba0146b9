"""``python -m experiments.levels``: measure what each level of each item costs."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict
from pathlib import Path

from experiments.config import Config
from experiments.config.common import parse_shape
from experiments.config.program_settings import LEVELS_SUFFIX
from experiments.contexts import build_context
from experiments.launch import launch
from experiments.study.console import say
from experiments.study.run_folder import RunFolder
from rap_env.artifacts import save_artifact
from rap_env.context.live import LiveContext
from rap_env.context.opening import require_live
from rap_env.importance.level_costs import LevelCosts
from rap_env.importance.level_scan import measure_jointly, scan_levels
from rap_env.memory import MemoryModel
from rap_env.models.files.loading import load_llm
from rap_env.policies.knapsack import KnapsackPolicy
from rap_env.policies.packaged_files import FACTS_VERSION
from rap_env.request import Request

log = logging.getLogger(__name__)

COSTS_FILE = "levels.json"


def levels(config: Config, folder: Path) -> Path:
    """Measure the costs of levels; existing files of the folder are kept.

    With `levels.out`, the costs are also written there, and the model's facts beside them.

    Returns:
        The path of ``levels.json``.
    """
    run, started = RunFolder(folder), time.monotonic()
    frozen = ("levels.caches", "levels.requests", "levels.joint_budgets")
    run.start(config, frozen=("model", "calibration", *frozen))
    context = require_live(build_context(config, profiled=False))
    settings, path = config.levels, folder / COSTS_FILE
    model = config.model
    unquantised = load_llm(model.name, device=model.device, dtype=model.dtype, weights="bf16").facts
    reference = MemoryModel(unquantised)  # its peak is what budgets are fractions of
    costs = _costs(config, context, reference, path)
    if (out := settings.out) is not None:
        facts_path = Path(out.removesuffix(LEVELS_SUFFIX) + ".facts.json")
        facts = {"native": asdict(context.memory.facts), "bf16": asdict(unquantised)}
        save_artifact(facts_path, "model facts", FACTS_VERSION, facts)  # for `rap choose`
        costs.save(out)
    run.finish(started, evaluations=costs.evaluations)
    say(f"The costs of {len(costs.costs)} items are in {path}.")
    return path


def _costs(config: Config, context: LiveContext, reference: MemoryModel, path: Path) -> LevelCosts:
    """Return the costs of all levels, corrected by those of the knapsack's plans at low budgets."""
    settings, progress = config.levels, config.progress
    if path.exists():
        return LevelCosts.load(path, context.memory)
    costs = scan_levels(context.scorer, settings.caches, progress=progress)
    policy = KnapsackPolicy(context.memory, costs)
    joint = [
        Request.at_fraction(reference, *shape, fraction)
        for shape in map(parse_shape, settings.requests)
        for fraction in sorted(set(settings.joint_budgets), reverse=True)
    ]
    plans = list(dict.fromkeys(map(policy.choose, joint)))
    costs = measure_jointly(costs, context.scorer, plans, progress=progress)
    costs.save(path)
    for row in costs.predictions():
        log.info(
            "Predicted %.4f, measured %.4f: %s", row["predicted"], row["measured"], row["plan"]
        )
    return costs


if __name__ == "__main__":
    launch("levels", levels)
