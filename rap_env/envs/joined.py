"""Several vector environments as one, so that an agent learns from all of them at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from rap_env.costs import Flags
from rap_env.envs.vector import PruningVectorEnv, each_seed
from rap_env.errors import InvalidRequestError
from rap_env.observation import Observation


class JoinedVectorEnv(gym.vector.VectorEnv[Observation, npt.NDArray[np.int64], Any]):
    """Vector environments with the same observations and actions, one after another.

    Their contexts differ, such as in the text that plans are scored on: an agent that learns from
    all of them learns to use what each observes of its own importance. Sub-environments keep the
    order of the parts.

    Args:
        parts: The environments.

    Attributes:
        parts: The environments.

    Raises:
        InvalidRequestError: There are none, or they differ in their spaces or autoreset modes.
    """

    def __init__(self, parts: Sequence[PruningVectorEnv[Any]]) -> None:
        self.parts = list(parts)
        kinds = {
            (str(part.single_observation_space), str(part.single_action_space), part.autoreset_mode)
            for part in self.parts
        }
        if len(kinds) != 1:
            raise InvalidRequestError(
                "Environments that are joined need one observation space, one action space and one "
                f"autoreset mode, but {len(self.parts)} of them have {len(kinds)} different ones."
            )
        first = self.parts[0]
        self.num_envs = sum(part.num_envs for part in self.parts)
        self.autoreset_mode: AutoresetMode = first.autoreset_mode
        self.metadata, self.render_mode = first.metadata, first.render_mode
        self.single_observation_space = first.single_observation_space
        self.single_action_space = first.single_action_space
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._ends = list(accumulate(part.num_envs for part in self.parts))

    @property
    def ladder(self) -> Any:
        """The ladder of the first part; None in v0."""
        return getattr(self.parts[0], "ladder", None)

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode in all sub-environments.

        Args:
            seed: Seed of the first sub-environment, the others following, or one for each.
            options: Those of every part, without a ``"reset_mask"``.

        Raises:
            InvalidRequestError: There is not one seed, or one for each sub-environment; or only
                some sub-environments are to be reset.
            RapError: As for a part.
        """
        if "reset_mask" in (options or {}):
            raise InvalidRequestError(
                "Joined environments are reset together: pass options['reset_mask'] to the reset() "
                "of one of `parts`, or make them with autoreset_mode='SameStep' or 'NextStep'."
            )
        seeds = self._split(each_seed(seed, self.num_envs))
        found = [
            part.reset(seed=own, options=options)
            for part, own in zip(self.parts, seeds, strict=True)
        ]
        return self._observations([seen for seen, _ in found]), self._infos([i for _, i in found])

    def step(
        self, actions: npt.NDArray[np.int64]
    ) -> tuple[Observation, npt.NDArray[np.float64], Flags, Flags, dict[str, Any]]:
        """Take an action in each sub-environment, (n,); errors are those of the parts."""
        found = [part.step(own) for part, own in zip(self.parts, self._split(actions), strict=True)]
        seen, rewards, terminated, truncated, infos = zip(*found, strict=True)
        return (
            self._observations(seen),
            np.concatenate(rewards),
            np.concatenate(terminated),
            np.concatenate(truncated),
            self._infos(infos),
        )

    def action_masks(self) -> Flags:
        """True for each action that is valid, shape (n, actions)."""
        return np.concatenate([part.action_masks() for part in self.parts])

    def render(self) -> tuple[Any, ...] | None:
        """Each sub-environment as the `render` of a single one shows it."""
        frames = [part.render() for part in self.parts]
        return None if self.render_mode is None else tuple(f for some in frames for f in some or ())

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """An attribute of a single environment, for each sub-environment; methods are called."""
        return tuple(value for part in self.parts for value in part.call(name, *args, **kwargs))

    def get_attr(self, name: str) -> tuple[Any, ...]:
        """As `call`."""
        return self.call(name)

    def get_state(self) -> list[dict[str, Any]]:
        """The state of each sub-environment, as JSON values."""
        return [state for part in self.parts for state in part.get_state()]

    def set_state(self, states: Sequence[Mapping[str, Any]]) -> Observation:
        """Restore what `get_state` returned, and return the observation of that state."""
        parts = zip(self.parts, self._split(states), strict=True)
        return self._observations([part.set_state(own) for part, own in parts])

    def close_extras(self, **kwargs: Any) -> None:
        """Close the parts."""
        for part in self.parts:
            part.close(**kwargs)

    def _split(self, values: Any) -> list[Any]:
        """The values of the sub-environments of each part."""
        return [
            values[end - part.num_envs : end]
            for part, end in zip(self.parts, self._ends, strict=True)
        ]

    def _observations(self, seen: Sequence[Observation]) -> Observation:
        return {key: np.concatenate([one[key] for one in seen]) for key in seen[0]}

    def _infos(self, infos: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        counts = [part.num_envs for part in self.parts]
        return joined_infos(infos, counts)


def joined_infos(infos: Sequence[Mapping[str, Any]], counts: Sequence[int]) -> dict[str, Any]:
    """The infos of several vector environments as those of one.

    Args:
        infos: Those of each environment, in gymnasium's form: arrays with a value for each
            sub-environment, or dicts of such arrays, and ``_key`` with flags for each `key`.
        counts: Number of sub-environments of each environment.
    """
    joined: dict[str, Any] = {}
    for key in dict.fromkeys(key for one in infos for key in one):
        known = [one[key] for one in infos if key in one]
        if isinstance(known[0], Mapping):
            joined[key] = joined_infos([one.get(key, {}) for one in infos], counts)
            continue
        parts = [
            one[key] if key in one else _nothing(known[0], count)
            for one, count in zip(infos, counts, strict=True)
        ]
        joined[key] = np.concatenate(parts)
    return joined


def _nothing(like: npt.NDArray[Any], count: int) -> npt.NDArray[Any]:
    """What stands for missing values in infos: 0, or None among objects."""
    return np.full((count, *like.shape[1:]), None if like.dtype == object else 0, dtype=like.dtype)
