"""From settings to live parts: workbench, environment, texts and tasks."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.config import Config, TasksConfig
from rap_env.scoring.corpus import CorpusConfig
from rap_env.workbench import Workbench, WorkbenchConfig, open_workbench

if TYPE_CHECKING:
    from rap_env.envs.prune import RAPPruneEnv
    from rap_env.scoring.tasks import TaskConfig

GSI_FILE = "gsi.json"


def gsi_artifact(config: Config) -> Path:
    """Where this comparison's GSI artifact lies once it is profiled."""
    return config.stage_dir("profile") / GSI_FILE


def workbench_config(config: Config, *, profiled: bool = True) -> WorkbenchConfig:
    """What to measure with.

    Args:
        config: All settings.
        profiled: Take the importance from this comparison's artifact, if there is one, so that
            an agent is evaluated with the very numbers that it was trained with.
    """
    importance = config.importance.method
    artifact = gsi_artifact(config)
    if profiled and importance == "gsi" and artifact.exists():
        importance = str(artifact)
    return WorkbenchConfig(
        model=config.model.name,
        device=config.model.device,
        dtype=config.model.dtype,
        calibration=CorpusConfig(**asdict(config.calibration), role="calibration"),
        importance=importance,
        gsi_removals=config.importance.gsi_removals,
        store=config.store,
    )


def open_bench(config: Config, *, profiled: bool = True) -> Workbench:
    """The workbench of this comparison; one for each config in a process.

    Raises:
        RapError: As loading the model, the text, the store or an artifact does.
    """
    return open_workbench(workbench_config(config, profiled=profiled))


def make_env(config: Config, workbench: Workbench) -> RAPPruneEnv:
    """The environment on a live workbench, which all environments of a training share.

    Raises:
        RapError: A setting of workload, reward or environment cannot be.
    """
    from rap_env.envs.prune import RAPPruneEnv

    return RAPPruneEnv(
        workbench=workbench,
        workload=config.workload,
        reward=config.reward,
        tasks=asdict(config.env.tasks) if config.env.tasks.names else None,
        infeasible=config.env.infeasible,
        invalid_action_penalty=config.env.invalid_action_penalty,
        max_invalid_actions=config.env.max_invalid_actions,
    )


def task_config(tasks: TasksConfig) -> TaskConfig:
    """The tasks in the scorer's own terms."""
    from rap_env.scoring.tasks import TaskConfig

    return TaskConfig(
        names=tuple(tasks.names),
        limit=tasks.limit,
        data_root=tasks.data_root,
        num_fewshot=tasks.num_fewshot,
    )
