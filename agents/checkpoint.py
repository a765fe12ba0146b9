"""Checkpoints that survive a kill at any moment, and are checked before they are believed.

A checkpoint is a folder that appears in one move. Its ``checkpoint.json`` carries the
checksums of the files beside it and one of its own.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import DictReplayBuffer
from stable_baselines3.common.vec_env import VecEnv

from agents.algorithms import AgentConfig
from agents.state import capture, fill_replay, replay_arrays, restore
from rap_env.artifacts import disk_errors, load_artifact, save_artifact
from rap_env.errors import ArtifactError

log = logging.getLogger(__name__)

_KIND, _VERSION = "checkpoint", 3
_MANIFEST, _MODEL, _REPLAY = "checkpoint.json", "model.zip", "replay.npz"
_KEEP = 2


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files were found whole.

    Attributes:
        folder: Where it lies.
        body: Its manifest: step, config, spaces, progress, state and checksums.
    """

    folder: Path
    body: dict[str, Any]

    @property
    def step(self) -> int:
        """Environment steps done when it was written."""
        return int(self.body["step"])

    @property
    def config(self) -> AgentConfig:
        """The agent that was trained."""
        return AgentConfig(**self.body["config"])

    def load_model(self, venv: VecEnv | None = None) -> BaseAlgorithm:
        """Load the model; with environments also the state from which training continues.

        The policy's class is passed by value: the file names it by the module that it was in
        when the file was written.
        """
        config = self.config
        model = config.algorithm.cls.load(
            self.folder / _MODEL,
            env=venv,
            device="cpu",
            custom_objects={"policy_class": config.policy_class},
            force_reset=False,
        )
        if venv is None:
            return model
        buffer = getattr(model, "replay_buffer", None)
        if isinstance(buffer, DictReplayBuffer):
            with np.load(self.folder / _REPLAY) as arrays:
                fill_replay(buffer, dict(arrays))
        restore(model, self.body["state"])
        return model


def save_checkpoint(
    folder: Path, model: BaseAlgorithm, config: AgentConfig, progress: dict[str, float]
) -> Path:
    """Write a checkpoint of `model` into a folder of its own, and drop all but the last two.

    Args:
        folder: Where the checkpoints of this run lie.
        model: What is trained, between two rollouts.
        config: What it was made from.
        progress: Numbers that go on counting after a resume (episodes, seconds, ...).

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
    """The newest whole checkpoint of a run.

    Args:
        run_dir: The run's folder.

    Raises:
        ArtifactError: There is none, or all are damaged.
    """
    checkpoint = latest_checkpoint(Path(run_dir) / "checkpoints")
    if checkpoint is None:
        raise ArtifactError(f"{run_dir} holds no checkpoint; train an agent there first.")
    return checkpoint


def latest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint, or None if there is none at all.

    A damaged one is passed over with a warning.

    Raises:
        ArtifactError: There are checkpoints, but every one is damaged.
    """
    problem: ArtifactError | None = None
    for candidate in _folders(folder):
        try:
            return _read(candidate)
        except ArtifactError as error:
            log.warning("%s The checkpoint before it is used, if there is one.", error)
            problem = error
    if problem is not None:
        raise ArtifactError(
            f"Every checkpoint in {folder} is damaged; delete that folder to begin anew. "
            f"The last one: {problem}"
        )
    return None


def check_same_run(checkpoint: Checkpoint, config: AgentConfig, venv: VecEnv) -> None:
    """Refuse to go on with a run under other settings; a new total of steps is welcome.

    Raises:
        ArtifactError: Agent, policy, seed, hyperparameters, environments or spaces differ.
    """
    wanted = {**config.as_dict(), **_spaces(venv.observation_space, venv.action_space)}
    found = {**checkpoint.config.as_dict(), **checkpoint.body["spaces"]}
    for key in wanted:
        if key != "total_timesteps" and wanted[key] != found[key]:
            raise ArtifactError(
                f"The run in {checkpoint.folder.parent.parent} was begun with {key}={found[key]!r} "
                f"and cannot go on with {key}={wanted[key]!r}; give the old value or another "
                "run folder."
            )


def _write(
    folder: Path, model: BaseAlgorithm, config: AgentConfig, progress: dict[str, float]
) -> None:
    model.save(folder / _MODEL)
    buffer = getattr(model, "replay_buffer", None)
    if isinstance(buffer, DictReplayBuffer):
        np.savez(folder / _REPLAY, **replay_arrays(buffer))  # type: ignore[arg-type]
    body = {
        "step": model.num_timesteps,
        "config": config.as_dict(),
        "spaces": _spaces(model.observation_space, model.action_space),
        "progress": progress,
        "state": capture(model),
        "files": {path.name: _checksum(path) for path in sorted(folder.iterdir())},
    }
    save_artifact(folder / _MANIFEST, _KIND, _VERSION, body)


def _read(folder: Path) -> Checkpoint:
    try:
        body = load_artifact(folder / _MANIFEST, _KIND, _VERSION)
        for name, checksum in body["files"].items():
            if _checksum(folder / name) != checksum:
                raise ArtifactError(f"{folder / name} was truncated or altered (checksum differs).")
    except FileNotFoundError as error:
        raise ArtifactError(f"The checkpoint {folder} lacks {error.filename}.") from None
    return Checkpoint(folder, body)


def _folders(folder: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    return sorted(folder.glob("step_*"), reverse=True)


def _spaces(observation_space: object, action_space: object) -> dict[str, str]:
    return {"observation_space": str(observation_space), "action_space": str(action_space)}


def _checksum(path: Path) -> str:
    """SHA-256 of a file, which is on the disk for sure when this returns."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()
