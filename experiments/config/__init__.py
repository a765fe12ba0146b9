"""Settings of all experiments: `Config` defines types and bounds, ``conf/`` holds values.

Hydra merges the YAML files and the command line into `Config`: a misspelt key or a wrong type
raises an error that names it, and `Section` rejects values that are not allowed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf

from experiments.config.common import Count, Section, TextConfig
from experiments.config.evaluation_settings import EvaluateConfig
from experiments.config.plain import PLAIN, completed, defaults
from experiments.config.replay_settings import BudgetConfig, ReplayConfig
from experiments.config.study_settings import (
    LadderConfig,
    LongContextConfig,
    PromptsConfig,
    TextsConfig,
)
from experiments.config.training_settings import AgentConfig, EnvConfig, ModelConfig
from experiments.study.experiment_errors import ExperimentError


@dataclass
class Config(Section):
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
    threads: Count | None = None
    """Threads of torch; null takes torch's own number, or 1 if workers measure, for all stages of a
    comparison."""
    model: ModelConfig = field(default_factory=ModelConfig)
    scoring: dict[str, Any] = field(default_factory=partial(defaults, PLAIN["scoring"]))
    calibration: TextConfig = field(default_factory=TextConfig)
    kinds: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Kinds of text by name, for policies that choose by the kind of text of the prompts: what
    differs from ``calibration``, such as ``{source: FILE, field: page, windows: 3}``."""
    importance: dict[str, Any] = field(default_factory=partial(defaults, PLAIN["importance"]))
    workload: dict[str, Any] = field(default_factory=dict)
    """Sampler of requests (`rap_env.workload`), and its settings."""
    reward: dict[str, Any] = field(default_factory=dict)
    """Reward (`rap_env.reward`), and its settings."""
    env: EnvConfig = field(default_factory=EnvConfig)
    agent: AgentConfig = field(default_factory=AgentConfig)
    warm_start: dict[str, Any] = field(default_factory=partial(defaults, PLAIN["warm_start"]))
    score_model: dict[str, Any] = field(default_factory=partial(defaults, PLAIN["score_model"]))
    frontier: dict[str, Any] = field(default_factory=partial(defaults, PLAIN["frontier"]))
    logger: dict[str, Any] = field(default_factory=partial(defaults, PLAIN["logger"]))
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    tight_grid: dict[str, Any] = field(default_factory=partial(defaults, PLAIN["tight_grid"]))
    texts: TextsConfig = field(default_factory=TextsConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    ladder: LadderConfig = field(default_factory=LadderConfig)
    long_context: LongContextConfig = field(default_factory=LongContextConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    cgroup: dict[str, Any] = field(default_factory=partial(defaults, PLAIN["cgroup"]))
    demo: dict[str, Any] = field(default_factory=partial(defaults, PLAIN["demo"]))
    report: dict[str, str] = field(
        default_factory=lambda: {"title": "Runtime-adaptive pruning: report"}
    )
    levels: dict[str, Any] = field(default_factory=partial(defaults, PLAIN["levels"]))
    export: dict[str, Any] = field(default_factory=partial(defaults, PLAIN["export"]))

    def __post_init__(self) -> None:
        super().__post_init__()
        for section, settings in PLAIN.items():
            setattr(self, section, completed(section, getattr(self, section), settings))
        if self.model.weights == "auto":
            self.model.weights = self.env.task.weights
        if self.scoring["address"] is not None and not self.scoring["workers"]:
            raise ExperimentError(
                "scoring.address names a Ray cluster, but scoring.workers is 0: nothing would run "
                "there. Set scoring.workers to the number of workers."
            )
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
