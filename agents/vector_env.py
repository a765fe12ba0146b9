"""A gymnasium vector environment as what stable-baselines3 trains on."""

from __future__ import annotations

import warnings
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
    """A `VecEnv` of stable-baselines3 whose lanes gymnasium steps together.

    To an agent it is what `DummyVecEnv` over the single environments is: the same seeds, the
    same observations, rewards and infos. It suits any vector environment of gymnasium's own
    kinds, and `rap_env.RAPPruneVectorEnv`, which scores the masks of all lanes together.

    Args:
        envs: The vector environment; its autoreset mode must be ``SAME_STEP``.

    Raises:
        UnknownNameError: It has another autoreset mode.
    """

    def __init__(self, envs: VectorEnv[Any, Any, Any]) -> None:
        mode = envs.metadata.get("autoreset_mode")
        if mode != AutoresetMode.SAME_STEP:
            raise UnknownNameError(
                "autoreset mode for stable-baselines3:",
                getattr(mode, "value", mode),
                [AutoresetMode.SAME_STEP.value],
                "A lane must begin its next episode in the step that ends the one before.",
            )
        self.envs = envs
        self._actions: npt.NDArray[Any] = np.zeros(0)
        super().__init__(envs.num_envs, envs.single_observation_space, envs.single_action_space)

    def reset(self) -> Any:
        """Begin an episode in every lane, with the seeds and options set before.

        Raises:
            InvalidRequestError: The lanes were given different options.
        """
        if any(options != self._options[0] for options in self._options):
            raise InvalidRequestError(
                "The lanes of a vector environment are reset together and take the same options, "
                f"not {self._options!r}."
            )
        seeds = None if None in self._seeds else list(self._seeds)
        observation, infos = self.envs.reset(
            seed=seeds,  # type: ignore[arg-type]  # gymnasium's own classes take a list too
            options=self._options[0] or None,
        )
        self.reset_infos = split_infos(infos, self.num_envs)
        self._reset_seeds()
        self._reset_options()
        return observation

    def step_async(self, actions: npt.NDArray[Any]) -> None:
        """Take note of the actions for `step_wait`."""
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Step all lanes; those whose episode ends begin the next one."""
        observation, rewards, terminated, truncated, infos = self.envs.step(self._actions)
        dones = np.asarray(terminated | truncated)
        each = split_infos(infos, self.num_envs)
        for lane in np.flatnonzero(dones).tolist():
            last = {"terminal_observation": each[lane].pop("final_obs")}
            last.update(each[lane].pop("final_info", {}))
            self.reset_infos[lane], each[lane] = each[lane], last
        for info, limit in zip(each, (truncated & ~terminated).tolist(), strict=True):
            info["TimeLimit.truncated"] = limit
        return observation, np.asarray(rewards, dtype=np.float32), dones, each

    def close(self) -> None:
        """Let go of the environments."""
        self.envs.close()

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """What some lanes have under a name; methods are called, as gymnasium does.

        Raises:
            AttributeError: They have no such thing.
        """
        return self.env_method(attr_name, indices=indices)

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute of all lanes at once.

        Raises:
            NotImplementedError: Only some lanes are meant; they share their attributes.
        """
        if list(self._get_indices(indices)) != list(range(self.num_envs)):
            raise NotImplementedError("Lanes stepped together share their attributes; set all.")
        setattr(self.envs, attr_name, value)

    def env_method(
        self, method_name: str, *args: Any, indices: VecEnvIndices = None, **kwargs: Any
    ) -> list[Any]:
        """What a method of every lane gives, for some lanes."""
        values = self.envs.call(method_name, *args, **kwargs)  # type: ignore[attr-defined]
        return [values[lane] for lane in self._get_indices(indices)]

    def env_is_wrapped(
        self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: VecEnvIndices = None
    ) -> list[bool]:
        """No lane is an environment of its own that could be wrapped."""
        return [False for _ in self._get_indices(indices)]

    def get_images(self) -> Sequence[npt.NDArray[Any] | None]:
        """A picture of each lane."""
        if self.render_mode != "rgb_array":
            warnings.warn(
                f"The render mode is {self.render_mode}, not 'rgb_array': there are no pictures.",
                stacklevel=2,
            )
            return [None] * self.num_envs
        pictures: Any = self.envs.render()
        return list(pictures)


def split_infos(infos: Mapping[str, Any], num_envs: int) -> list[Info]:
    """The infos of a gymnasium vector environment as one dict for each lane.

    Args:
        infos: Arrays with a value for each lane; ``_key`` says which lanes have `key`.
        num_envs: How many lanes there are.

    Returns:
        For each lane what it has, numbers as those of Python.
    """
    each: list[Info] = [{} for _ in range(num_envs)]
    for key, values in infos.items():
        if key.startswith("_"):
            continue
        if isinstance(values, Mapping):
            values = split_infos(values, num_envs)
        elif isinstance(values, np.ndarray) and values.ndim == 1:
            values = values.tolist()
        flags = infos.get(f"_{key}")
        lanes = range(num_envs) if flags is None else np.flatnonzero(flags).tolist()
        for lane in lanes:
            each[lane][key] = values[lane]
    return each
