"""A study of a random model, which keeps everything in one folder."""

from pathlib import Path
from typing import Any

import torch

from experiments.config import Config
from experiments.config.common import ImportanceConfig, ModelConfig, TextConfig
from experiments.config.program_settings import AgentConfig, EnvSettings
from tests.models.states import saved

WORKLOAD = {"name": "grid", "batch_sizes": [1, 2], "seq_lens_tokens": [16],
            "budget_fractions": [0.9]}  # fmt: skip


def own_text(windows: int = 3, window_tokens: int = 12, seed: int = 0) -> TextConfig:
    """A text that the model writes itself."""
    return TextConfig(source="self", windows=windows, window_tokens=window_tokens, seed=seed)


def short_training(steps: int = 64, **hyperparameters: Any) -> AgentConfig:
    """A training of a few steps."""
    values = {"n_steps": 16, "batch_size": 16, **hyperparameters}
    return AgentConfig("maskable_ppo", total_timesteps=steps, n_envs=2, hyperparameters=values)


def tiny_study(base: Path, layers: int = 4, **settings: Any) -> Config:
    """Write a random model into a folder, and return settings for it."""
    saved(base / "model", dtype=torch.float32, layers=layers)
    common = {
        "name": "tiny", "runs_dir": str(base / "runs"), "store": str(base / "scores.sqlite"),
        "workload": WORKLOAD, "reward": {"name": "perplexity"}, "progress": False,
        "calibration": own_text(), "importance": ImportanceConfig(method="none"),
        "model": ModelConfig(name=str(base / "model"), device="cpu", dtype="float32"),
    }  # fmt: skip
    return Config(**{**common, **settings})


LEVELS = {"weights": ["int8", "removed"], "caches": ["int8", "int4"], "embeddings": ["int8"]}


def tiny_ladder_study(base: Path, **settings: Any) -> Config:
    """Settings for trainings on `LEVELS` of a random model of three layers."""
    common = {
        "env": EnvSettings(id="RAPLadder-v0", levels=LEVELS, together=["int8"]), "threads": 1,
        "model": ModelConfig(str(base / "model"), "cpu", "float32", weights="native"),
        "calibration": own_text(2, 12), "importance": ImportanceConfig(method="one_shot"),
        "workload": {"name": "grid", "batch_sizes": [1, 4], "seq_lens_tokens": [16, 64],
                     "budget_fractions": [0.6, 0.8, 0.9]},
    }  # fmt: skip
    return tiny_study(base, layers=3, **common, **settings)
