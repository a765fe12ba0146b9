"""What a finished training says: how its policy compares, where it is, and what comes next."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import rap_env
from agents.trained_policy import TrainedPolicy
from experiments.config import Config
from experiments.study.statistics import bootstrap_mean
from rap_env.context.base import PruningContext
from rap_env.leaderboard.tasks import pinned_tasks
from rap_env.policies.packaged_files import DEFAULT_MODEL
from rap_env.scoring.score_table import PREFIX


def task_of(config: Config) -> str | None:
    """Return the newest pinned task on the score table that a training runs on, if it has one."""
    own = config.env.id, config.model.name
    tasks = (task for task in pinned_tasks().values() if not task.live)
    names = [task.name for task in tasks if (task.environment, task.arguments["model"]) == own]
    return max(names, default=None)


def verdict(config: Config, folder: Path, context: PruningContext) -> str:
    """Return a policy's ΔNLL beside the published methods; "" if no pinned task has its table.

    Args:
        config: The settings of the training.
        folder: Its run folder.
        context: The score table that it ran on.
    """
    task = task_of(config)
    if task is None:
        return ""
    policy = TrainedPolicy.load(folder, context)
    result = rap_env.evaluate(policy, task, "test", name=folder.name, seed=config.seed)
    mean = bootstrap_mean(result.scores)
    return (
        f"{result}\nAll plans of the published methods were measured on the model.\n\n"
        f"{folder.name}: ΔNLL {mean.mean:.3f} [{mean.low:.3f}, {mean.high:.3f}] nats per token on "
        "held-out text, 95 % over requests."
    )


def next_steps(
    config: Config, folder: Path, context: PruningContext, overrides: Sequence[str]
) -> str:
    """Return a run's folder, and the commands that judge, export and serve its policy.

    Args:
        config: The settings of the training.
        folder: Its run folder.
        context: What it ran on.
        overrides: The settings of the command that started it.
    """
    facts, settings = context.memory.facts, list(overrides)
    if config.model.name.startswith(PREFIX):
        settings = [text for text in settings if not text.startswith("model.name=")]
        settings.append(f"model.name={facts.name}")
    run, file = f"run={folder}", f"{config.name}.safetensors"
    if "=" in str(folder):  # in the name of a run with settings of its own: quoted for Hydra
        run = f"\"run='{folder}'\""
    serve = f"rap serve --policy {file}"
    if facts.name.partition("@")[0] != DEFAULT_MODEL:
        serve += f" --model {facts.name}"
    if not facts.packed:
        serve += " --weights bf16"
    return (
        f"The run is in {folder}. Next, measure it on the model beside other methods; export it; "
        f"serve it:\n  python -m experiments.evaluate {' '.join(settings)}\n"
        f"  python -m experiments.export_policy {run} out={file}\n  {serve}"
    )
