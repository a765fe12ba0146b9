"""Checkpoints: written atomically, and verified by checksums.

A checkpoint is a folder that is renamed into place. Its ``checkpoint.json`` has the checksums
of the other files and its own, and the running statistics of rewards. A training that resumes
begins its unfinished episodes anew.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from agents.algorithms import AgentConfig
from agents.vector_env import GymVecEnv
from rap_env.artifacts import disk_errors, load_artifact, save_artifact
from rap_env.errors import ArtifactError

log = logging.getLogger(__name__)

_KIND, _VERSION = "checkpoint", 4
_MANIFEST, _MODEL, _REPLAY = "checkpoint.json", "model.zip", "replay.pkl"
_KEEP = 2

Json = dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files were verified.

    Attributes:
        body: Its manifest: step, config, spaces, progress, reward statistics and checksums.
    """

    folder: Path
    body: dict[str, Any]

    @property
    def step(self) -> int:
        """Number of environment steps before it was written."""
        return int(self.body["step"])

    @property
    def config(self) -> AgentConfig:
        """Configuration of the agent that was trained."""
        return AgentConfig(**self.body["config"])

    @property
    def observed(self) -> Json:
        """What the agent observes: `ObservationEncoder.spec` of the environments."""
        spec: Json = self.body["ladder"]
        return spec

    def load_model(self, venv: VecEnv | None = None) -> BaseAlgorithm:
        """Load the model; with environments also what training continues with."""
        model = self.config.algorithm.cls.load(self.folder / _MODEL, env=venv, device="cpu")
        if venv is None:
            return model
        if isinstance(model, OffPolicyAlgorithm):
            model.load_replay_buffer(self.folder / _REPLAY)
        if normalize := model.get_vec_normalize_env():
            saved, statistics = self.body["rewards"], normalize.ret_rms
            statistics.mean, statistics.var = np.array(saved["mean"]), np.array(saved["var"])
            statistics.count = saved["count"]
        model.set_random_seed(self.config.seed + self.step)
        return model


def save_checkpoint(
    folder: Path, model: BaseAlgorithm, config: AgentConfig, progress: dict[str, float]
) -> Path:
    """Write a checkpoint between two rollouts, and delete all but the last two.

    The counters in `progress` continue after a resume.

    Raises:
        StorageFullError: The disk is full; earlier checkpoints are intact.
    """
    final = folder / f"step_{model.num_timesteps:09d}"
    with disk_errors(final):
        folder.mkdir(parents=True, exist_ok=True)
        for left_over in folder.glob(".new-*"):
            shutil.rmtree(left_over, ignore_errors=True)
        new = Path(tempfile.mkdtemp(dir=folder, prefix=".new-"))
        try:
            _write(new, model, config, progress)
            if final.exists():
                shutil.rmtree(final)
            os.replace(new, final)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
    for old in _folders(folder)[_KEEP:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def checkpoint_of(run_dir: str | Path) -> Checkpoint:
    """Return the newest undamaged checkpoint of a run.

    Raises:
        ArtifactError: There is none, or all are damaged.
    """
    checkpoint = latest_checkpoint(Path(run_dir) / "checkpoints")
    if checkpoint is None:
        raise ArtifactError(f"{run_dir} holds no checkpoint; train an agent there first.")
    return checkpoint


def latest_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the newest undamaged checkpoint, or None if there is none; damaged ones are logged.

    Raises:
        ArtifactError: All checkpoints are damaged.
    """
    problem: ArtifactError | None = None
    for each in _folders(folder):
        try:
            return _read(each)
        except ArtifactError as error:
            problem = error
            log.warning("%s", error)
    if problem is not None:
        raise ArtifactError(
            f"No checkpoint in {folder} can be used; delete them, and the training begins anew. "
            f"{problem}"
        )
    return None


def check_same_run(checkpoint: Checkpoint, config: AgentConfig, venv: VecEnv) -> None:
    """Check that a run is resumed with the same settings; only the total of steps may change.

    Raises:
        ArtifactError: Agent, policy, seed, hyperparameters, environments, ladder or spaces
            differ.
    """
    asked = {
        **config.as_dict(),
        "ladder": _observed(venv),
        **_spaces(venv.observation_space, venv.action_space),
    }
    started = {
        **checkpoint.config.as_dict(),
        "ladder": checkpoint.observed,
        **checkpoint.body["spaces"],
    }
    for key, value in asked.items():
        if key != "total_timesteps" and value != started[key]:
            raise ArtifactError(
                f"The run in {checkpoint.folder.parent.parent} was started with "
                f"{key}={started[key]!r} and cannot resume with {key}={value!r}; use the old "
                "value or another run folder."
            )


def _write(
    folder: Path, model: BaseAlgorithm, config: AgentConfig, progress: dict[str, float]
) -> None:
    assert model.env is not None
    model.save(folder / _MODEL)
    if isinstance(model, OffPolicyAlgorithm):
        model.save_replay_buffer(folder / _REPLAY)
    rewards: Json = {}
    if normalize := model.get_vec_normalize_env():
        statistics = normalize.ret_rms
        rewards = {name: float(getattr(statistics, name)) for name in ("mean", "var", "count")}
    body = {
        "step": model.num_timesteps,
        "config": config.as_dict(),
        "spaces": _spaces(model.observation_space, model.action_space),
        "ladder": _observed(model.env),
        "progress": progress,
        "rewards": rewards,
        "files": {path.name: _checksum(path) for path in sorted(folder.iterdir())},
    }
    save_artifact(folder / _MANIFEST, _KIND, _VERSION, body)


def _read(folder: Path) -> Checkpoint:
    try:
        body = load_artifact(folder / _MANIFEST, _KIND, _VERSION)
        for name, checksum in body["files"].items():
            if _checksum(folder / name) != checksum:
                raise ArtifactError(f"{folder / name} was truncated or altered (checksum differs).")
    except (ArtifactError, FileNotFoundError) as error:
        raise ArtifactError(f"{folder} is damaged and is not used. {error}") from None
    return Checkpoint(folder, body)


def _folders(folder: Path) -> list[Path]:
    """Return the folders of a run's checkpoints, newest first."""
    return sorted(folder.glob("step_*"), reverse=True)


def _spaces(observation_space: object, action_space: object) -> dict[str, str]:
    return {"observation_space": str(observation_space), "action_space": str(action_space)}


def _checksum(path: Path) -> str:
    """Flush a file to the disk and return its SHA-256."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _observed(env: VecEnv) -> Json:
    innermost = env.unwrapped
    assert isinstance(innermost, GymVecEnv)
    spec: Json = cast(Any, innermost.envs).encoder.spec
    return spec
