"""`RAPAcross-v0`: the ladder over several models, one of which is drawn at each reset."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from rap_env.envs.base import PruningEnv
from rap_env.envs.ladder import RAPLadderEnv, RAPLadderVectorEnv
from rap_env.errors import InvalidRequestError
from rap_env.ladder.observation import Observation, ObservationEncoder
from rap_env.request import whole_number


class RAPAcrossEnv(gym.Env[Observation, np.int64]):
    """`RAPLadder-v0` over several models, one of which is drawn at each reset.

    ## Description
    For policies that are to serve models that they never saw: train on some models, be judged
    on others. Each `reset` draws one of `models`, all with equal probability; request, actions,
    reward and end are those of `RAPLadder-v0` on that model.

    ## Observation Space and Action Space
    Those of `RAPLadder-v0` for `items` items: rows past those of the drawn model are 0, and
    actions there are invalid. All numbers are shares (of the model's native peak, of its
    layers, of its levels) or costs in nats per token, so they mean the same for each model.
    `padded` gives an observation of any other model this form.

    ## Arguments
    | Argument | Default | Meaning |
    |----------|---------|---------|
    | `models` | required | names of models, as for `RAPLadder-v0` |
    | `items` | `None` | rows and actions; `None`: as many as the largest ladder of `models` has |
    | `workloads` | `{}` | workloads of some models, by name, in the place of `workload` |

    Further arguments are those of `RAPLadder-v0`, for each model. `info` has the name of the
    drawn one as `model`. Options of `reset` are those of `RAPLadder-v0`. With `items`, only the
    first model is prepared at once, and each other one when it is first drawn.

    ## Version History
    - v0: First version.
    """

    metadata = PruningEnv.metadata

    def __init__(
        self,
        models: Sequence[str] = (),
        *,
        items: int | None = None,
        workloads: Mapping[str, Any] | None = None,
        render_mode: str | None = None,
        **arguments: Any,
    ) -> None:
        self._given = _arguments(models, workloads, {**arguments, "render_mode": render_mode})
        self.models, self.render_mode = [*self._given], render_mode
        self._made: dict[str, RAPLadderEnv] = {}
        most = (len(self._env(model).ladder) for model in self.models)
        self.items = max(most) if items is None else items
        encoder = self.env_of(self.models[0]).encoder
        self.observation_space = _space(encoder, self.items)  # type: ignore[assignment]
        self.action_space = gym.spaces.Discrete(self.items)
        self._drawn: PruningEnv | None = None

    def env_of(self, model: str) -> RAPLadderEnv:
        """The environment of one of the models, which is prepared when it is first needed."""
        env = self._env(model)
        env.num_actions = whole_number("items", self.items, least=len(env.ladder))
        return env

    def _env(self, model: str) -> RAPLadderEnv:
        if model not in self._made:
            self._made[model] = RAPLadderEnv(model, **self._given[model])
        return self._made[model]

    @property
    def drawn(self) -> PruningEnv:
        """The environment of the drawn model; a `ResetNeeded` before the first episode."""
        if self._drawn is None:
            raise ResetNeeded("No episode has begun; call reset() first.")
        return self._drawn

    def padded(self, observation: Observation) -> Observation:
        """An observation of one model with `items` rows; the further ones are 0."""
        seen = {}
        for name, space in self.observation_space.items():  # type: ignore[attr-defined]
            seen[name] = np.zeros(space.shape, space.dtype)
            seen[name][: len(observation[name])] = observation[name]
        return seen

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Draw a model and start an episode; errors are those of `RAPLadder-v0`."""
        super().reset(seed=seed)
        self._drawn = self.env_of(self.models[self.np_random.integers(len(self.models))])
        drawn_seed = int(self.np_random.integers(2**31))
        observation, info = self._drawn.reset(seed=drawn_seed, options=options)
        return self.padded(observation), {**info, "model": self._drawn.memory.facts.name}

    def step(self, action: np.int64 | int) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Take an action on the drawn model; errors are those of `RAPLadder-v0`."""
        observation, reward, terminated, truncated, info = self.drawn.step(action)
        info = {**info, "model": self.drawn.memory.facts.name}
        return self.padded(observation), reward, terminated, truncated, info

    def action_masks(self) -> npt.NDArray[np.bool_]:
        """True for each action that is valid, shape (items,)."""
        masks = np.zeros(self.items, dtype=bool)
        masks[: len(self.drawn.ladder)] = self.drawn.action_masks()
        return masks

    def render(self) -> Any:
        """As `RAPLadder-v0` on the drawn model."""
        return self.drawn.render()


class RAPAcrossVectorEnv(gym.vector.VectorEnv[Observation, npt.NDArray[np.int64], Any]):
    """n sub-environments over several models, with the arguments of `RAPAcrossEnv`.

    Each has a model of its own, the same in all its episodes: the first ones the first model,
    and so on, as many each as possible. Those of one model are a `RAPLadderVectorEnv`, so that
    plans of a model that end together run together.

    Args:
        models: As for `RAPAcrossEnv`.
        num_envs: Number of sub-environments, at least one for each model.
        items: As for `RAPAcrossEnv`.
        workloads: As for `RAPAcrossEnv`.
        autoreset_mode: As for `RAPLadderVectorEnv`.
        arguments: Those of `RAPLadderVectorEnv`, for each model.

    Attributes:
        parts: The vector environment of each model.
        rows: The sub-environments of each, as a slice.
    """

    metadata = RAPLadderVectorEnv.metadata

    def __init__(
        self,
        models: Sequence[str] = (),
        *,
        num_envs: int = 1,
        items: int | None = None,
        workloads: Mapping[str, Any] | None = None,
        autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
        **arguments: Any,
    ) -> None:
        each = _arguments(models, workloads, arguments)
        self.num_envs = whole_number("num_envs", num_envs, least=len(each))
        ends = [number * num_envs // len(each) for number in range(len(each) + 1)]
        self.rows = [slice(*pair) for pair in itertools.pairwise(ends)]
        self.parts = [
            RAPLadderVectorEnv(
                model, num_envs=rows.stop - rows.start, autoreset_mode=autoreset_mode, **given
            )
            for rows, (model, given) in zip(self.rows, each.items(), strict=True)
        ]
        most = max(len(part.ladder) for part in self.parts)
        self.items = most if items is None else whole_number("items", items, least=most)
        for part in self.parts:
            part.num_actions = self.items
        self.metadata = self.parts[0].metadata
        self.single_observation_space = _space(self.parts[0].encoder, self.items)
        self.single_action_space = gym.spaces.Discrete(self.items)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._models = np.repeat(np.array(list(each), dtype=object), np.diff(ends))

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode in all sub-environments; see `RAPLadderVectorEnv.reset`."""
        seeds = range(seed, seed + self.num_envs) if isinstance(seed, int) else seed
        return self._joined(
            part.reset(seed=None if seeds is None else list(seeds[rows]), options=options)
            for part, rows in zip(self.parts, self.rows, strict=True)
        )

    def step(self, actions: npt.NDArray[np.int64]) -> tuple[Any, ...]:
        """Take an action in each sub-environment; see `RAPLadderVectorEnv.step`."""
        parts = zip(self.parts, self.rows, strict=True)
        return self._joined(part.step(np.asarray(actions)[rows]) for part, rows in parts)

    def action_masks(self) -> npt.NDArray[np.bool_]:
        """True for each action that is valid, (n, items)."""
        masks = np.zeros((self.num_envs, self.items), dtype=bool)
        for part, rows in zip(self.parts, self.rows, strict=True):
            masks[rows, : len(part.ladder)] = part.action_masks()
        return masks

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """An attribute of each sub-environment; methods are called."""
        if name == "action_masks":
            return tuple(self.action_masks())
        return tuple(itertools.chain(*(part.call(name, *args, **kwargs) for part in self.parts)))

    def _joined(self, parts: Any) -> tuple[Any, ...]:
        """Observations, arrays (n,) and infos of all models from those of each."""
        seen, *arrays, infos = zip(*parts, strict=True)
        joined = self._infos(infos, self.rows)
        joined["model"], joined["_model"] = self._models, np.ones(self.num_envs, dtype=bool)
        observation = {
            name: self._padded([each[name] for each in seen], self.rows, space.shape[1:])
            for name, space in self.observation_space.items()  # type: ignore[attr-defined]
        }
        return observation, *map(np.concatenate, arrays), joined

    def _infos(self, infos: Sequence[dict[str, Any]], rows: Sequence[slice]) -> dict[str, Any]:
        joined: dict[str, Any] = {}
        for key in dict.fromkeys(itertools.chain(*infos)):
            pairs = [(each[key], own) for each, own in zip(infos, rows, strict=True) if key in each]
            values, of = zip(*pairs, strict=True)
            if isinstance(values[0], dict):
                joined[key] = self._infos(values, of)
            else:
                widths = self.items if values[0].ndim > 1 else ()
                joined[key] = self._padded(values, of, np.atleast_1d(widths))
        for seen in (each for each in joined.get("final_obs", ()) if each is not None):
            for name, space in self.single_observation_space.items():  # type: ignore[attr-defined]
                seen[name] = self._padded([seen[name][None]], [slice(1)], space.shape, 1)[0]
        return joined

    def _padded(
        self,
        values: Sequence[npt.NDArray[Any]],
        rows: Sequence[slice],
        shape: Any,
        count: int | None = None,
    ) -> npt.NDArray[Any]:
        """Arrays of some rows in one with so many rows, (count, *shape); the rest is 0 or None."""
        empty = None if values[0].dtype == object else 0
        joined = np.full((count or self.num_envs, *map(int, shape)), empty, values[0].dtype)
        for array, own in zip(values, rows, strict=True):
            joined[(own, slice(array.shape[1])) if array.ndim > 1 else own] = array
        return joined


def _arguments(
    models: Sequence[str], workloads: Mapping[str, Any] | None, arguments: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """The arguments of the environment of each model."""
    if isinstance(models, str) or not models:
        raise InvalidRequestError(
            f"models must be a list of names, as ['tiny-deep', 'tiny-wide'], not {models!r}."
        )
    own = workloads or {}
    return {
        model: {**arguments, "workload": own[model]} if model in own else {**arguments}
        for model in models
    }


def _space(encoder: ObservationEncoder, items: int) -> gym.spaces.Dict:
    """The space of observations with so many rows."""
    rows: dict[str, gym.Space[Any]] = {
        encoder.key: gym.spaces.Box(0.0, 1.0, (items, len(encoder.features)), np.float32),
        "action_mask": gym.spaces.MultiBinary(items),
    }
    return gym.spaces.Dict({**encoder.space, **rows})  # type: ignore[dict-item]
