"""Adapter from gymnasium vector environments to the `VecEnv` of stable-baselines3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode, VectorEnv
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvStepReturn

from rap_env.errors import InvalidRequestError, UnknownNameError

Info = dict[str, Any]


class GymVecEnv(VecEnv):
    """A `VecEnv` of stable-baselines3 on top of a gymnasium vector environment.

    An agent sees the same seeds, observations and rewards as with `DummyVecEnv` over single
    environments, and the same infos of episodes that end. Those of others are not read: they
    say only that nothing was truncated. It works with gymnasium's own vector environments and with
    `rap_env.RAPPruneVectorEnv`, which scores the plans of all sub-environments together.

    Raises:
        UnknownNameError: The autoreset mode is not ``SAME_STEP``.
    """

    def __init__(self, envs: VectorEnv[Any, Any, Any]) -> None:
        mode = envs.metadata.get("autoreset_mode")
        if mode != AutoresetMode.SAME_STEP:
            raise UnknownNameError(
                "autoreset mode for stable-baselines3:",
                mode.value if isinstance(mode, AutoresetMode) else mode,
                [AutoresetMode.SAME_STEP.value],
                "A sub-environment must be reset in the step that ends its episode.",
            )
        self.envs = envs
        self._actions: npt.NDArray[Any] = np.zeros(0)
        super().__init__(envs.num_envs, envs.single_observation_space, envs.single_action_space)

    def reset(self) -> Any:
        """Reset all sub-environments with the seeds and options that were set before.

        Raises:
            InvalidRequestError: The options of the sub-environments differ.
        """
        if any(options != self._options[0] for options in self._options):
            raise InvalidRequestError(
                "The sub-environments of a vector environment are reset together and take the same "
                f"options, not {self._options!r}."
            )
        seeds = None if None in self._seeds else list(self._seeds)
        observation, infos = self.envs.reset(
            seed=seeds,  # type: ignore[arg-type]  # gymnasium's own classes take a list too
            options=self._options[0] or None,
        )
        self.reset_infos = split_infos(infos, range(self.num_envs))
        self._reset_seeds()
        self._reset_options()
        return observation

    def step_async(self, actions: npt.NDArray[Any]) -> None:
        """Keep the actions for `step_wait`."""
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Step all sub-environments; those whose episode ends are reset."""
        observation, rewards, terminated, truncated, infos = self.envs.step(self._actions)
        dones = np.asarray(terminated | truncated)
        each: list[Info] = [{"TimeLimit.truncated": False} for _ in range(self.num_envs)]
        over = np.flatnonzero(dones).tolist()
        for index, info in zip(over, split_infos(infos, over), strict=True):
            each[index] = {"terminal_observation": info.pop("final_obs")}
            each[index].update(info.pop("final_info", {}))
            each[index]["TimeLimit.truncated"] = bool(truncated[index] and not terminated[index])
            self.reset_infos[index] = info
        return observation, np.asarray(rewards, dtype=np.float32), dones, each

    def close(self) -> None:
        """Close the environments."""
        self.envs.close()

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """Return an attribute of some sub-environments; methods are called, as gymnasium does."""
        return self.env_method(attr_name, indices=indices)

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute, which all sub-environments share."""
        setattr(self.envs, attr_name, value)

    def env_method(
        self, method_name: str, *args: Any, indices: VecEnvIndices = None, **kwargs: Any
    ) -> list[Any]:
        """Call a method of all sub-environments and return the results of some."""
        values = self.envs.call(method_name, *args, **kwargs)  # type: ignore[attr-defined]
        return [values[index] for index in self._get_indices(indices)]

    def env_is_wrapped(
        self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: VecEnvIndices = None
    ) -> list[bool]:
        """Return False for each: a sub-environment is no object that could be wrapped."""
        return [False for _ in self._get_indices(indices)]


def split_infos(infos: Mapping[str, Any], indices: Sequence[int]) -> list[Info]:
    """Split the infos of a gymnasium vector environment into one dict per sub-environment.

    Args:
        infos: Arrays with a value for each sub-environment; ``_key`` flags those that have
            `key`.
        indices: The sub-environments.

    Returns:
        The dict of each of these sub-environments, with Python numbers.
    """
    each: list[Info] = [{} for _ in indices]
    if not each:
        return each
    for key, values in infos.items():
        if key.startswith("_"):
            continue
        if isinstance(values, Mapping):
            chosen: Any = split_infos(values, indices)
        elif isinstance(values, np.ndarray):
            chosen = values[indices]
            chosen = chosen.tolist() if values.ndim == 1 else chosen
        else:
            chosen = [values[index] for index in indices]
        flags = infos.get(f"_{key}")
        has_it = [True] * len(each) if flags is None else flags[indices].tolist()
        for info, value, has in zip(each, chosen, has_it, strict=True):
            if has:
                info[key] = value
    return each
