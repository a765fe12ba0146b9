"""Vector environments: sub-environments step and are scored together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.error import ResetNeeded
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from rap_env.costs import Counts, Flags, RequestCosts
from rap_env.envs.base import PruningEnv, reopen
from rap_env.envs.config import EnvConfig, check_render_mode
from rap_env.envs.episode import CostsT
from rap_env.envs.prune import RAPPruneEnv
from rap_env.envs.task import PruningTask, reset_options
from rap_env.envs.vector_episodes import VectorEpisodes
from rap_env.errors import InvalidRequestError, check_name
from rap_env.observation import Observation
from rap_env.plan import Plan
from rap_env.render import Scene, render_ansi, render_rgb
from rap_env.request import Request, whole_number
from rap_env.specs import check_settings

if TYPE_CHECKING:
    from rap_env.context.base import PruningContext

_OWN_ARGUMENTS = ("num_envs", "autoreset_mode", "max_episode_steps", "render_mode", "context")

_EACH = {
    "mask": "masks",
    "plan": "plans",
    "request": "requests",
    "render": "render",
    "action_masks": "action_masks",
    "np_random": "np_random",
    "np_random_seed": "np_random_seed",
}
"""Attributes that differ between sub-environments: their name here by that of a single one."""


class PruningVectorEnv(
    gym.vector.VectorEnv[Observation, npt.NDArray[np.int64], Any], Generic[CostsT]
):
    """n environments of one kind, stepped as arrays; `RAPPruneVectorEnv` describes it."""

    metadata = {  # noqa: RUF012 - gymnasium declares it so
        **PruningEnv.metadata,
        "autoreset_mode": AutoresetMode.NEXT_STEP,
    }

    single_type: ClassVar[type[PruningEnv[Any]]]
    """The single environment."""

    def __init__(
        self,
        model: str = EnvConfig.model,
        *,
        num_envs: int = 1,
        autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
        max_episode_steps: int | None = None,
        render_mode: str | None = None,
        context: PruningContext | None = None,
        **settings: Any,
    ) -> None:
        self.num_envs = whole_number("num_envs", num_envs, least=1)
        if max_episode_steps is not None:
            limits = [whole_number("max_episode_steps", max_episode_steps, least=1)]
            if settings.get("max_steps") is not None:
                limits.append(settings["max_steps"])
            settings["max_steps"] = min(limits)
        self.autoreset_mode = _autoreset_mode(autoreset_mode)
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        self.render_mode = check_render_mode(render_mode)
        config_type = self.single_type.config_type
        check_settings(settings, "the environment", [*config_type.names(), *_OWN_ARGUMENTS])
        self._config = config_type.of(model=model, **settings)
        task: PruningTask[CostsT] = self.single_type.make_task(self._config, context)
        self._task = task
        self.context, self.memory = task.context, task.memory
        self.single_observation_space = task.observations.space
        self.single_action_space = gym.spaces.Discrete(task.num_actions)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._samplers = [task.sampler.clone() for _ in range(num_envs)]
        self._generators = [seeding.np_random() for _ in range(num_envs)]
        self._episodes = VectorEpisodes(num_envs, task)

    @property  # type: ignore[misc]
    def np_random(self) -> tuple[np.random.Generator, ...]:  # type: ignore[override]
        """The generator of each sub-environment."""
        return tuple(generator for generator, _ in self._generators)

    @property
    def np_random_seed(self) -> tuple[int, ...]:  # type: ignore[override]
        """The seed of each sub-environment's generator."""
        return tuple(seed for _, seed in self._generators)

    @property
    def requests(self) -> tuple[Request, ...]:
        """The request of each sub-environment."""
        return tuple(self._started.starts[index].request for index in range(self.num_envs))

    @property
    def plans(self) -> tuple[Plan, ...]:
        """The plan of each sub-environment."""
        return tuple(self._started.state.plans(np.arange(self.num_envs)))

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode in all or some sub-environments.

        Args:
            seed: Seed of the first sub-environment, the others following, or one for each.
            options: ``"request"`` sets the request of all these episodes, as for the single
                environment; ``"reset_mask"`` says which sub-environments to reset, boolean, (n,).

        Raises:
            ResetNeeded: Only some sub-environments are reset, but others have no episode yet.
            InvalidRequestError: Seeds or flags are not one for each sub-environment, or as for
                the single environment.
            RapError: As for the single environment.
        """
        rest = reset_options(options)
        flags = _reset_flags(rest.pop("reset_mask", None), self.num_envs)
        if not flags.all():
            self._started  # noqa: B018 - raises if others would stay without an episode
        for index, given in enumerate(each_seed(seed, self.num_envs)):
            if given is not None and flags[index]:
                self._generators[index] = seeding.np_random(given)
                self._samplers[index].restart()
        self._start(flags, rest)
        none = np.zeros(self.num_envs, dtype=bool)
        return self._episodes.observation(), self._episodes.infos(flags, {}, none)

    def step(
        self, actions: npt.NDArray[np.int64]
    ) -> tuple[Observation, npt.NDArray[np.float64], Flags, Flags, dict[str, Any]]:
        """Take an action in each sub-environment. If the model fails, no state changes.

        Raises:
            ResetNeeded: A sub-environment has no episode, or (without autoreset) it is over.
            UnknownNameError: There is no such action.
            InvalidRequestError: There is not one action for each sub-environment.
            NonFiniteScoreError: The model gave NaN or infinity.
        """
        episodes = self._started
        active = self._active()
        step = episodes.plan(_actions(actions, active, self._task), active)
        terms, measurements = episodes.compute_rewards(step)
        episodes.apply(step, measurements)
        rewards = np.asarray(sum(terms.values()))
        episodes.over = step.terminated | step.truncated | ~active
        final: dict[str, Any] = {}
        if self.autoreset_mode == AutoresetMode.NEXT_STEP:
            self._start(~active)
        elif self.autoreset_mode == AutoresetMode.SAME_STEP and episodes.over.any():
            done, active = episodes.over.copy(), active & ~episodes.over
            final = episodes.final_infos(done, terms)
            self._start(done)
        every = np.ones(self.num_envs, dtype=bool)
        infos = {**final, **episodes.infos(every, terms, active)}
        return episodes.observation(), rewards, step.terminated, step.truncated, infos

    def action_masks(self) -> Flags:
        """True for each action that is valid, shape (n, actions)."""
        return self._started.action_masks()

    def render(self) -> tuple[Any, ...] | None:
        """Each sub-environment as the `render` of a single one shows it."""
        if self.render_mode is None:
            gym.logger.warn("render() does nothing without a render_mode: 'ansi' or 'rgb_array'.")
            return None
        draw = render_ansi if self.render_mode == "ansi" else render_rgb
        delta_nll = map(self._episodes.delta_nll, range(self.num_envs))
        states = zip(self.requests, self.plans, delta_nll, strict=True)
        scenes = (Scene(self.memory, *state, self._task.unchanged) for state in states)
        return tuple(map(draw, scenes))

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """An attribute of a single environment, for each sub-environment; methods are called."""
        value = getattr(self, _EACH.get(name, name))
        value = value(*args, **kwargs) if callable(value) else value
        differs = name in _EACH and value is not None
        return tuple(value) if differs else (value,) * self.num_envs

    def get_attr(self, name: str) -> tuple[Any, ...]:
        """As `call`."""
        return self.call(name)

    def get_state(self) -> list[dict[str, Any]]:
        """The state of each sub-environment, as JSON values: generator, workload and episode."""
        return [
            {
                "generator": self.np_random[index].bit_generator.state,
                "position": self._samplers[index].position,
                **self._started.get_state(index),
            }
            for index in range(self.num_envs)
        ]

    def set_state(self, states: Sequence[Mapping[str, Any]]) -> Observation:
        """Restore what `get_state` returned; unknown scores are measured again.

        Returns:
            The observation of that state.

        Raises:
            RapError: The model does not have those blocks or cannot serve those requests.
        """
        for index, state in enumerate(states):
            self._generators[index][0].bit_generator.state = state["generator"]
            self._samplers[index].restart(state["position"])
            self._episodes.set_state(index, state)
        return self._episodes.observation()

    def __reduce__(self) -> tuple[Any, ...]:
        arguments = {
            **self._config.arguments,
            "num_envs": self.num_envs,
            "autoreset_mode": self.autoreset_mode,
            "render_mode": self.render_mode,
        }
        episodes = self._episodes
        kept = ("spec", "action_space", "single_action_space", "_generators")
        state = {
            "attributes": {name: getattr(self, name) for name in kept},
            "positions": [sampler.position for sampler in self._samplers],
            "episodes": {index: episodes.get_state(index) for index in episodes.starts},
            "measured": episodes.measured.copy(),
        }
        return reopen, (type(self), self.context, arguments), state

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state["attributes"])
        for sampler, position in zip(self._samplers, state["positions"], strict=True):
            sampler.restart(position)
        for index, episode in state["episodes"].items():
            self._episodes.set_state(index, {**episode, "measured": False})
        self._episodes.measured = state["measured"]

    @property
    def _started(self) -> VectorEpisodes[CostsT]:
        if len(self._episodes.starts) < self.num_envs:
            raise ResetNeeded("No episode has begun; call reset() first.")
        return self._episodes

    def _active(self) -> Flags:
        """Sub-environments that act in this step, (n,); the others start an episode."""
        over = self._episodes.over
        if self.autoreset_mode != AutoresetMode.NEXT_STEP and over.any():
            raise ResetNeeded(
                f"The episodes of sub-environments {np.flatnonzero(over).tolist()} are over; call "
                "reset(options={'reset_mask': flags}) for them before the next step()."
            )
        return ~over

    def _start(self, flags: Flags, options: Mapping[str, Any] | None = None) -> None:
        """Start an episode where there is a flag; if one cannot start, none does."""
        starts = {
            index: self._task.start_episode(
                self._samplers[index], self._generators[index][0], options
            )
            for index in np.flatnonzero(flags).tolist()
        }
        self._episodes.start(starts, self._task.measured_start)


class RAPPruneVectorEnv(PruningVectorEnv[RequestCosts]):
    """n environments of the kind of `rap_env.RAPPruneEnv`, stepped as arrays.

    The same seeds give the same episodes as n single environments under
    `gymnasium.vector.SyncVectorEnv` with the same `autoreset_mode`, infos included. The scores
    that a step needs are measured together, so that masks share common computation.

    `gymnasium.make_vec` makes it unless it is given a `vectorization_mode`, and takes the arguments
    below. Its `vector_kwargs` are for gymnasium's own vector environments; `rap_env.make_vec`
    takes them here too.

    Args:
        model: As for the single environment.
        num_envs: Number of environments, n.
        autoreset_mode: When a sub-environment whose episode is over starts the next one:
            ``"NextStep"`` (its next step, whatever the action), ``"SameStep"`` (the step that
            ends it; infos hold ``final_obs`` and ``final_info``) or ``"Disabled"`` (at
            ``reset(options={"reset_mask": flags})``). Every observation has an action mask with a
            valid action, the last one of an episode included.
        max_episode_steps: The argument `max_steps` of the single environment, under the name that
            ``gymnasium.make_vec`` passes.
        render_mode: As for the single environment.
        context: As for the single environment.
        settings: The other arguments of the single environment.

    Attributes:
        context: The model with its memory arithmetic, scorer and importance.
        memory: The model's byte arithmetic.

    Raises:
        InvalidRequestError: `num_envs` or `max_episode_steps` is no whole number of at least 1, or
            a setting is out of its range.
        UnknownNameError: There is no such argument, autoreset mode, render mode or other name.
    """

    single_type = RAPPruneEnv

    @property
    def masks(self) -> tuple[Plan, ...]:
        """The blocks that each sub-environment has removed."""
        return self.plans


def make_vec(
    id: str,
    num_envs: int = 1,
    *,
    vectorization_mode: str | None = None,
    vector_kwargs: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> gym.vector.VectorEnv[Any, Any, Any]:
    """`gymnasium.make_vec`, with `vector_kwargs` in every mode.

    `gymnasium.make_vec` rejects `vector_kwargs` for environments that bring a vector environment
    of their own, as those of this package do; there, their entries are plain arguments.

    Args:
        id: Name of an environment, such as ``"RAPPrune-v0"``.
        num_envs: Number of environments, n.
        vectorization_mode: None for `RAPPruneVectorEnv` and its like, ``"sync"`` or ``"async"``
            for gymnasium's vector environments of n single ones. With ``"async"`` and a start
            method other than fork, each of the n processes loads a model.
        vector_kwargs: Arguments of the vector environment, such as ``autoreset_mode``.
        arguments: The other arguments of ``gymnasium.make_vec`` and of the environment.

    Raises:
        UnknownNameError: There is no such argument.
        RapError: As for the environment.
    """
    given = dict(vector_kwargs or {})
    if vectorization_mode is None:
        return gym.make_vec(id, num_envs, **{**arguments, **given})
    return gym.make_vec(
        id, num_envs, vectorization_mode=vectorization_mode, vector_kwargs=given, **arguments
    )


def _autoreset_mode(mode: str | AutoresetMode) -> AutoresetMode:
    if not isinstance(mode, AutoresetMode):
        check_name("autoreset mode", mode, [each.value for each in AutoresetMode])
    return AutoresetMode(mode)


def _actions(actions: npt.NDArray[np.int64], active: Flags, task: PruningTask[Any]) -> Counts:
    """The action of each active sub-environment, 0 for the others, (n,)."""
    given = np.asarray(actions)
    if given.shape != active.shape:
        raise InvalidRequestError(
            f"step() takes an array of {len(active)} actions, one for each sub-environment, not "
            f"one of shape {given.shape}."
        )
    whole = np.issubdtype(given.dtype, np.integer)
    wrong = active & ((given < 0) | (given >= task.num_actions)) if whole else active
    if wrong.any():
        raise task.unknown_action(given[wrong][0].item())
    return np.where(active, given, 0).astype(np.int64)


def each_seed(seed: int | Sequence[int | None] | None, num_envs: int) -> Sequence[int | None]:
    """The seed of each sub-environment: those given, or the one given and its successors.

    Raises:
        InvalidRequestError: There is not one for each sub-environment.
    """
    if seed is None:
        return [None] * num_envs
    if isinstance(seed, int | np.integer):
        return [int(seed) + index for index in range(num_envs)]
    if len(seed) != num_envs:
        raise InvalidRequestError(
            f"reset() takes one seed, or one for each of {num_envs} sub-environments, not "
            f"{len(seed)}."
        )
    return seed


def _reset_flags(given: Any, num_envs: int) -> Flags:
    """The sub-environments to reset: all, or those of a ``reset_mask``, (n,)."""
    if given is None:
        return np.ones(num_envs, dtype=bool)
    flags = np.asarray(given)
    if flags.shape != (num_envs,) or flags.dtype != np.bool_ or not flags.any():
        raise InvalidRequestError(
            f"options['reset_mask'] must hold {num_envs} booleans, one for each sub-environment "
            f"and at least one of them true, not {given!r}."
        )
    return flags
