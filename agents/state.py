"""What training needs besides the networks to go on as if it had never stopped.

All of it is plain JSON values: random generators, running statistics of the rewards, and the
episodes that are under way.
"""

from __future__ import annotations

import logging
import random
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import DictReplayBuffer
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecMonitor, VecNormalize
from stable_baselines3.common.vec_env.base_vec_env import VecEnvWrapper

log = logging.getLogger(__name__)

Json = dict[str, Any]
_REPLAY_FIELDS = ("actions", "rewards", "dones", "timeouts")


class ReplayableEnv(gym.Wrapper[Any, Any, Any, Any]):
    """Remembers how the episode under way came about, so that it can be played again.

    It needs no help from the environment but what every environment promises: the same
    generator and the same actions give the same episode.
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self._begun: Json = {"seed": 0, "generator": None}
        self._actions: list[int] = []

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin an episode, and remember what it is drawn from."""
        generator = self.env.unwrapped.np_random.bit_generator.state if seed is None else None
        self._begun = {"seed": seed, "generator": generator}
        self._actions = []
        return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """One step, remembered."""
        self._actions.append(int(action))
        return self.env.step(action)

    def get_state(self) -> Json:
        """Where the episode stands, as plain JSON values."""
        return {**self._begun, "actions": list(self._actions)}

    def set_state(self, state: Json) -> Any:
        """Play an episode again up to where it stood; gives the observation there."""
        if state["generator"] is not None:
            self.env.unwrapped.np_random.bit_generator.state = state["generator"]
        observation, _ = self.reset(seed=state["seed"])
        for action in state["actions"]:
            observation, *_ = self.step(action)
        return observation


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
        "envs": model.env.env_method("get_state"),
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
    env = model.env
    assert env is not None
    seen = [env.env_method("set_state", one, indices=[i])[0] for i, one in enumerate(states)]
    last = model._last_obs
    assert isinstance(last, dict)
    if all(np.array_equal(last[k][i], obs[k]) for i, obs in enumerate(seen) for k in last):
        return
    log.warning(
        "The environment does not play the interrupted episodes again as they were; new ones begin."
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


def _find(env: VecEnv, kind: type[VecEnvWrapper]) -> VecEnvWrapper | None:
    while isinstance(env, VecEnvWrapper):
        if isinstance(env, kind):
            return env
        env = env.venv
    assert isinstance(env, DummyVecEnv)
    return None
