"""What training needs besides the networks to go on as if it had never stopped.

All of it is plain JSON values: random generators, running statistics of the rewards, and the
episodes that are under way.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import DictReplayBuffer
from stable_baselines3.common.vec_env import VecEnv, VecMonitor, VecNormalize
from stable_baselines3.common.vec_env.base_vec_env import VecEnvWrapper

from agents.vector_env import GymVecEnv

log = logging.getLogger(__name__)

Json = dict[str, Any]
_REPLAY_FIELDS = ("actions", "rewards", "dones", "timeouts")


class Resumable(Protocol):
    """A vector environment that can say where it stands, such as `RAPPruneVectorEnv`."""

    def get_state(self) -> list[Json]:
        """Where each lane stands, as plain JSON values."""

    def set_state(self, states: Sequence[Json]) -> dict[str, npt.NDArray[Any]]:
        """Go on from there; gives the observation."""


def capture(model: BaseAlgorithm) -> Json:
    """Generators, reward statistics and episodes under way, as plain JSON values."""
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


def restore(model: BaseAlgorithm, state: Json) -> None:
    """Put back what `capture` gave; the generators last, since the rest may draw from them."""
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
    log.warning(
        "The environment does not show the interrupted episodes as they were; new ones begin."
    )
    env.seed(model.num_timesteps)
    model._last_obs = None  # makes `learn` reset the environments


def replay_arrays(buffer: DictReplayBuffer) -> dict[str, np.ndarray]:
    """The filled part of a replay buffer, as arrays by name."""
    size = buffer.size()
    arrays = {name: getattr(buffer, name)[:size] for name in _REPLAY_FIELDS}
    for key in buffer.observations:
        arrays[f"observations.{key}"] = buffer.observations[key][:size]
        arrays[f"next_observations.{key}"] = buffer.next_observations[key][:size]
    return {**arrays, "position": np.array([buffer.pos, int(buffer.full)])}


def fill_replay(buffer: DictReplayBuffer, arrays: dict[str, np.ndarray]) -> None:
    """Put back what `replay_arrays` gave."""
    size = len(arrays["actions"])
    for name in _REPLAY_FIELDS:
        getattr(buffer, name)[:size] = arrays[name]
    for key in buffer.observations:
        buffer.observations[key][:size] = arrays[f"observations.{key}"]
        buffer.next_observations[key][:size] = arrays[f"next_observations.{key}"]
    buffer.pos, buffer.full = int(arrays["position"][0]), bool(arrays["position"][1])


def _resumable(env: VecEnv) -> Resumable:
    innermost = env.unwrapped
    assert isinstance(innermost, GymVecEnv)
    envs: Any = innermost.envs
    return envs  # type: ignore[no-any-return]


def _find(env: VecEnv, kind: type[VecEnvWrapper]) -> VecEnvWrapper | None:
    while isinstance(env, VecEnvWrapper):
        if isinstance(env, kind):
            return env
        env = env.venv
    return None
