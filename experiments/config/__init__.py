"""Settings of all experiments: `Config` defines types and bounds, ``conf/`` holds values.

Hydra merges the YAML files and the command line into `Config`: a misspelt key or a wrong type
raises an error that names it, and values that are not allowed are rejected.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf

from experiments.config import common
from experiments.config import program_settings as programs
from experiments.study.console import ExperimentError
from rap_env.specs import check, setting


@dataclass
class Config:
    """All settings; each program reads the sections that it needs."""

    stage: str = MISSING
    """Name of the program; set by its file in ``conf/``."""
    name: str = "default"
    """Name of the comparison; its records are in ``<runs_dir>/<name>``."""
    runs_dir: str = "runs"
    """Folder of all comparisons."""
    seed: int = 0
    """Seed of what the program draws."""
    store: str | None = "default"
    """Score store: ``default`` (in the user's cache), a file, or null for none."""
    progress: bool = True
    """Whether progress bars are shown."""
    threads: int | None = setting(None, low=1)
    """Threads of torch; null takes torch's own number for all stages of a comparison."""
    model: common.ModelConfig = field(default_factory=common.ModelConfig)
    calibration: common.TextConfig = field(default_factory=common.TextConfig)
    importance: common.ImportanceConfig = field(default_factory=common.ImportanceConfig)
    workload: dict[str, Any] = setting({})
    """Sampler of requests (`rap_env.workload`), and its settings."""
    reward: dict[str, Any] = setting({})
    """Reward (`rap_env.reward`), and its settings."""
    env: programs.EnvSettings = field(default_factory=programs.EnvSettings)
    agent: programs.AgentConfig = field(default_factory=programs.AgentConfig)
    warm_start: programs.WarmStartConfig = field(default_factory=programs.WarmStartConfig)
    score_model: programs.ScoreModelConfig = field(default_factory=programs.ScoreModelConfig)
    frontier: programs.FrontierConfig = field(default_factory=programs.FrontierConfig)
    logger: programs.LoggerConfig = field(default_factory=programs.LoggerConfig)
    evaluate: programs.EvaluateConfig = field(default_factory=programs.EvaluateConfig)
    tight_grid: programs.TightGridConfig = field(default_factory=programs.TightGridConfig)
    cgroup: programs.CgroupConfig = field(default_factory=programs.CgroupConfig)
    equal_process: programs.EqualProcessConfig = field(default_factory=programs.EqualProcessConfig)
    demo: programs.DemoConfig = field(default_factory=programs.DemoConfig)
    export: programs.ExportConfig = field(default_factory=programs.ExportConfig)

    def __post_init__(self) -> None:
        check(self, ExperimentError, none="null")
        if self.model.weights == "auto":
            self.model.weights = self.env.task.weights
        if not re.fullmatch(r"[\w.+-]+", self.name):
            raise ExperimentError(
                f"name must be one folder name of letters, digits and . _ + -, not {self.name!r}."
            )

    @property
    def root(self) -> Path:
        """The comparison's folder."""
        return Path(self.runs_dir) / self.name

    def stage_dir(self, stage: str) -> Path:
        """Return the folder of one stage of this comparison."""
        return self.root / stage


def as_config(node: Any) -> Config:
    """Convert what Hydra composed to a validated `Config`.

    Raises:
        RapError: A value is out of range.
    """
    config = OmegaConf.to_object(node)
    if not isinstance(config, Config):
        raise ExperimentError("The settings were not composed over the schema 'rap_schema'.")
    return config
