"""Checkpoints: written atomically, verified by checksums, and complete enough to resume exactly.

A checkpoint is a folder that is renamed into place. Its ``checkpoint.json`` has the checksums
of the other files and its own. Beside the networks it holds what training needs to continue
bit for bit: random generators, running reward statistics and the unfinished episodes, as
plain JSON.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import DictReplayBuffer
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv, VecMonitor, VecNormalize
from stable_baselines3.common.vec_env.base_vec_env import VecEnvWrapper

from agents.algorithms import AgentConfig
from agents.vector_env import GymVecEnv
from rap_env.artifacts import disk_errors, load_artifact, save_artifact
from rap_env.errors import ArtifactError

log = logging.getLogger(__name__)

_KIND, _VERSION = "checkpoint", 3
_MANIFEST, _MODEL, _REPLAY = "checkpoint.json", "model.zip", "replay.npz"
_KEEP = 2
_REPLAY_FIELDS = ("actions", "rewards", "dones", "timeouts")

Json = dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files were verified.

    Attributes:
        body: Its manifest: step, config, spaces, progress, state and checksums.
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
        """Load the model; with environments also the state from which training continues."""
        model = self.config.algorithm.cls.load(
            self.folder / _MODEL, env=venv, device="cpu", force_reset=False
        )
        if venv is None:
            return model
        buffer = _replay_buffer(model)
        if buffer is not None:
            with np.load(self.folder / _REPLAY) as arrays:
                fill_replay(buffer, dict(arrays))
        restore(model, self.body["state"])
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
    """Return the newest undamaged checkpoint, or None if there is no checkpoint.

    A damaged checkpoint is skipped with a warning.

    Raises:
        ArtifactError: There are checkpoints, but all are damaged.
    """
    problem: ArtifactError | None = None
    for candidate in _folders(folder):
        try:
            return _read(candidate)
        except ArtifactError as error:
            log.warning("%s The previous checkpoint is used, if there is one.", error)
            problem = error
    if problem is not None:
        raise ArtifactError(
            f"Every checkpoint in {folder} is damaged; delete that folder to start again. "
            f"The last error: {problem}"
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
        "ladder": _resumable(venv).encoder.spec,
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
    buffer = _replay_buffer(model)
    if buffer is not None:
        np.savez(folder / _REPLAY, **replay_arrays(buffer))  # type: ignore[arg-type]
    body = {
        "step": model.num_timesteps,
        "config": config.as_dict(),
        "spaces": _spaces(model.observation_space, model.action_space),
        "ladder": _resumable(model.env).encoder.spec,
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
    """Return the folders of a run's checkpoints, newest first."""
    return sorted(folder.glob("step_*"), reverse=True)


def _spaces(observation_space: object, action_space: object) -> dict[str, str]:
    return {"observation_space": str(observation_space), "action_space": str(action_space)}


def _checksum(path: Path) -> str:
    """Flush a file to the disk and return its SHA-256."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def capture(model: BaseAlgorithm) -> Json:
    """Return random generators, reward statistics and unfinished episodes as plain JSON."""
    assert model.env is not None
    kind, version, internal = random.getstate()
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    state: Json = {
        "python": [kind, list(version), internal],
        "numpy": [name, [int(key) for key in keys], position, has_gauss, gauss],
        "torch": torch.get_rng_state().tolist(),
        "action_space": model.action_space.np_random.bit_generator.state,
        "envs": _resumable(model.env).get_state(),
    }
    monitor, normalize = _find(model.env, VecMonitor), _find(model.env, VecNormalize)
    if isinstance(monitor, VecMonitor):
        state["monitor"] = {
            "returns": monitor.episode_returns.tolist(),
            "lengths": monitor.episode_lengths.tolist(),
            "count": monitor.episode_count,
        }
    if isinstance(normalize, VecNormalize):
        rms = normalize.ret_rms
        state["normalize"] = {
            "mean": float(rms.mean),
            "var": float(rms.var),
            "count": float(rms.count),
            "returns": normalize.returns.tolist(),
        }
    return state


def invalid_actions(venv: VecEnv) -> npt.NDArray[np.int64]:
    """Return the number of invalid actions in each unfinished episode."""
    states = _resumable(venv).get_state()
    return np.array([state["episode"]["invalid_actions"] for state in states], dtype=np.int64)


def restore(model: BaseAlgorithm, state: Json) -> None:
    """Restore the state from `capture`; generators last, since the rest may draw from them."""
    assert model.env is not None
    _restore_episodes(model, state["envs"])
    monitor, normalize = _find(model.env, VecMonitor), _find(model.env, VecNormalize)
    if isinstance(monitor, VecMonitor):
        monitor.episode_returns = np.array(state["monitor"]["returns"], dtype=np.float32)
        monitor.episode_lengths = np.array(state["monitor"]["lengths"], dtype=np.int32)
        monitor.episode_count = state["monitor"]["count"]
    if isinstance(normalize, VecNormalize):
        saved = state["normalize"]
        rms = normalize.ret_rms
        rms.mean, rms.var = np.array(saved["mean"]), np.array(saved["var"])
        rms.count = saved["count"]
        normalize.returns = np.array(saved["returns"])
    model.action_space.np_random.bit_generator.state = state["action_space"]
    kind, version, internal = state["python"]
    random.setstate((kind, tuple(version), internal))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))


def _restore_episodes(model: BaseAlgorithm, states: list[Json]) -> None:
    env, last = model.env, model._last_obs
    assert env is not None
    assert isinstance(last, dict)
    seen = _resumable(env).set_state(states)
    if all(np.array_equal(last[key], seen[key]) for key in last):
        return
    log.warning("The environment cannot reproduce the unfinished episodes; new episodes start.")
    env.seed(model.num_timesteps)
    model._last_obs = None  # makes `learn` reset the environments


def replay_arrays(buffer: DictReplayBuffer) -> dict[str, np.ndarray]:
    """Return the filled part of a replay buffer as arrays by name."""
    size = buffer.size()
    arrays = {name: getattr(buffer, name)[:size] for name in _REPLAY_FIELDS}
    for key in buffer.observations:
        arrays[f"observations.{key}"] = buffer.observations[key][:size]
        arrays[f"next_observations.{key}"] = buffer.next_observations[key][:size]
    return {**arrays, "position": np.array([buffer.pos, int(buffer.full)])}


def fill_replay(buffer: DictReplayBuffer, arrays: dict[str, np.ndarray]) -> None:
    """Restore a replay buffer from `replay_arrays`."""
    size = len(arrays["actions"])
    for name in _REPLAY_FIELDS:
        getattr(buffer, name)[:size] = arrays[name]
    for key in buffer.observations:
        buffer.observations[key][:size] = arrays[f"observations.{key}"]
        buffer.next_observations[key][:size] = arrays[f"next_observations.{key}"]
    buffer.pos, buffer.full = int(arrays["position"][0]), bool(arrays["position"][1])


def _resumable(env: VecEnv) -> Any:
    innermost = env.unwrapped
    assert isinstance(innermost, GymVecEnv)
    return innermost.envs


def _replay_buffer(model: BaseAlgorithm) -> DictReplayBuffer | None:
    """The transitions that an off-policy algorithm learns from; None without one."""
    buffer = model.replay_buffer if isinstance(model, OffPolicyAlgorithm) else None
    return buffer if isinstance(buffer, DictReplayBuffer) else None


def _find(env: VecEnv, kind: type[VecEnvWrapper]) -> VecEnvWrapper | None:
    while isinstance(env, VecEnvWrapper):
        if isinstance(env, kind):
            return env
        env = env.venv
    return None
