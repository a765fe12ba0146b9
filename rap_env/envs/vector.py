"""Vector environments: sub-environments step and are scored together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.error import ResetNeeded
from gymnasium.utils.seeding import np_random
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from rap_env.context.base import PruningContext
from rap_env.envs.base import PruningEnv, reopen
from rap_env.envs.config import EnvConfig, check_render_mode
from rap_env.envs.task import Flags, PruningTask, reset_options
from rap_env.envs.vector_episodes import VectorEpisodes
from rap_env.errors import InvalidRequestError, check_name
from rap_env.ladder.items import Counts
from rap_env.ladder.observation import Observation
from rap_env.plan import Plan
from rap_env.request import Request, whole_number
from rap_env.specs import check_settings

_OWN_ARGUMENTS = ("num_envs", "autoreset_mode", "max_episode_steps", "render_mode", "context")


class PruningVectorEnv(gym.vector.VectorEnv[Observation, npt.NDArray[np.int64], Any]):
    """n environments of one kind, whose scores are measured together.

    The same seeds give the same episodes as n single environments under
    `gymnasium.vector.SyncVectorEnv` with the same `autoreset_mode`, infos included. The
    scores that a step needs are measured together, so that plans share common computation.

    `gymnasium.make_vec` makes it unless it is given a `vectorization_mode`, and takes the
    arguments below. Its `vector_kwargs` are for gymnasium's own vector environments;
    `rap_env.make_vec` takes them here too.

    Args:
        model: As for the single environment.
        num_envs: Number of environments, n.
        autoreset_mode: When a sub-environment whose episode is over starts the next one:
            ``"NextStep"`` (its next step, whatever the action), ``"SameStep"`` (the step that
            ends it; infos hold ``final_obs`` and ``final_info``) or ``"Disabled"`` (at
            ``reset(options={"reset_mask": flags})``). Every observation has an action mask
            with a valid action, the last one of an episode included.
        max_episode_steps: The argument `max_steps` of the single environment, under the name
            that ``gymnasium.make_vec`` passes.
        render_mode: As for the single environment.
        context: As for the single environment.
        settings: The other arguments of the single environment.

    Attributes:
        context: The model with its memory arithmetic, scorer and importance.
        memory: The model's byte arithmetic.
        encoder: Encodes the observations.
        ladder: The items, in the order of the actions, and the levels of each.
        num_actions: Actions that `step` takes; those past the items are invalid.

    Raises:
        InvalidRequestError: `num_envs` or `max_episode_steps` is no whole number of at least
            1, or a setting is out of its range.
        UnknownNameError: There is no such argument, autoreset mode, render mode or other
            name.
    """

    metadata = {  # noqa: RUF012 - gymnasium declares it so
        **PruningEnv.metadata,
        "autoreset_mode": AutoresetMode.NEXT_STEP,
    }

    single_type: ClassVar[type[PruningEnv]]
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
        task = self._task = PruningTask(self._config, context)
        self.context, self.memory = task.context, task.memory
        self.encoder, self.ladder = task.encoder, task.ladder
        self.num_actions = len(task.ladder)
        self._generators: list[np.random.Generator | None] = [None] * num_envs
        self._seeds = [-1] * num_envs
        self._episodes = VectorEpisodes(num_envs, task)
        self.single_observation_space = task.encoder.space
        self.single_action_space = gym.spaces.Discrete(self.num_actions)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    @property
    def envs(self) -> list[PruningEnv]:
        """Single environments in the state of the sub-environments."""
        envs = self._envs
        for row, (env, generator) in enumerate(zip(envs, self.np_random, strict=True)):
            env.np_random = generator
            if self._episodes.started[row]:
                env.current = self._episodes.episode(row)
        return envs

    @cached_property
    def _envs(self) -> list[PruningEnv]:
        """Single environments, made when one is asked for: a step needs none."""
        return [self.single_type.sharing(self._task, self.render_mode) for _ in self._seeds]

    def _all_generators(self) -> list[np.random.Generator]:
        generators = self._generators
        if None in generators:
            for row, generator in enumerate(generators):
                if generator is None:
                    generators[row], self._seeds[row] = np_random()
        return generators  # type: ignore[return-value]

    @property  # type: ignore[misc]
    def np_random(self) -> tuple[np.random.Generator, ...]:  # type: ignore[override]
        """The generator of each sub-environment."""
        self._episodes.rewind()
        return tuple(self._all_generators())

    @property
    def np_random_seed(self) -> tuple[int, ...]:  # type: ignore[override]
        """The seed of each sub-environment's generator."""
        self._all_generators()
        return tuple(self._seeds)

    @property
    def requests(self) -> tuple[Request, ...]:
        """The request of each sub-environment."""
        return tuple(env.request for env in self.envs)

    @property
    def plans(self) -> tuple[Plan, ...]:
        """The plan of each sub-environment."""
        return tuple(env.plan for env in self.envs)

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
                environment; ``"reset_mask"`` says which sub-environments to reset, boolean,
                (n,).

        Raises:
            ResetNeeded: Only some sub-environments are reset, but others have no episode yet.
            InvalidRequestError: Seeds or flags are not one for each sub-environment, or as
                for the single environment.
            RapError: As for the single environment.
        """
        rest = reset_options(options)
        flags = _reset_flags(rest.pop("reset_mask", None), self.num_envs)
        check_settings(rest, "reset", ["request"])
        if not flags.all():
            self._started  # noqa: B018 - raises if others would stay without an episode
        if seed is not None:
            self._episodes.rewind()
        for row, given in enumerate(_each_seed(seed, self.num_envs)):
            if flags[row] and given is not None:
                self._generators[row], self._seeds[row] = np_random(given)
        self._begin(flags, rest.get("request"))
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
        episodes, task = self._started, self._task
        active = self._active()
        actions = _actions(actions, active, task, self.num_actions)
        terms, terminated, truncated = episodes.step(actions, active)
        rewards = np.asarray(sum(terms.values()))
        final: dict[str, Any] = {}
        if self.autoreset_mode == AutoresetMode.NEXT_STEP:
            self._begin(~active)
        elif self.autoreset_mode == AutoresetMode.SAME_STEP and episodes.over.any():
            done, active = episodes.over.copy(), active & ~episodes.over
            final = episodes.final_infos(done, terms)
            self._begin(done)
        every = np.ones(self.num_envs, dtype=bool)
        infos = {**final, **episodes.infos(every, terms, active)}
        return episodes.observation(), rewards, terminated, truncated, infos

    def action_masks(self) -> Flags:
        """True for each action that is valid, shape (n, actions)."""
        return self._started.action_masks()

    def render(self) -> tuple[Any, ...] | None:
        """Each sub-environment as the `render` of a single one shows it."""
        frames = tuple(env.render() for env in self.envs)
        return None if self.render_mode is None else frames

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """An attribute of each sub-environment; methods are called."""
        if name == "action_masks":  # agents ask for it at each step
            return tuple(self.action_masks())
        values = [getattr(env, name) for env in self.envs]
        return tuple(value(*args, **kwargs) if callable(value) else value for value in values)

    def get_attr(self, name: str) -> tuple[Any, ...]:
        """As `call`."""
        return self.call(name)

    def get_state(self) -> list[dict[str, Any]]:
        """The state of each sub-environment, as JSON values: generator, workload and episode."""
        return [env.get_state() for env in self.envs]

    def set_state(self, states: Sequence[Mapping[str, Any]]) -> Observation:
        """Restore what `get_state` returned; unknown scores are measured again.

        Returns:
            The observation of that state.

        Raises:
            RapError: The model does not have those items or cannot serve those requests.
        """
        self._restore(states)
        return self._episodes.observation()

    def _restore(self, states: Sequence[Mapping[str, Any]]) -> None:
        for row, (env, state) in enumerate(zip(self.envs, states, strict=True)):
            env.set_state(state)
            self._episodes.resume(row, env.current)

    def __reduce__(self) -> tuple[Any, ...]:
        arguments = {
            **self._config.arguments,
            "num_envs": self.num_envs,
            "autoreset_mode": self.autoreset_mode,
            "render_mode": self.render_mode,
        }
        state = {
            "spec": self.spec,
            "action_space": self.action_space,
            "single_action_space": self.single_action_space,
            "seeds": self.np_random_seed,
            "states": self.get_state(),
        }
        return reopen, (type(self), self.context, arguments), state

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.spec, self.action_space = state["spec"], state["action_space"]
        self.single_action_space = state["single_action_space"]
        self._restore(state["states"])
        self._seeds = list(state["seeds"])

    @property
    def _started(self) -> VectorEpisodes:
        if not self._episodes.started.all():
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

    def _begin(self, flags: Flags, request: Any = None) -> None:
        """Start an episode where there is a flag; if one cannot start, none does."""
        (rows,) = flags.nonzero()
        if len(rows):
            self._episodes.begin(rows, self._all_generators(), request)


def make_vec(
    id: str,
    num_envs: int = 1,
    *,
    vectorization_mode: str | None = None,
    vector_kwargs: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> gym.vector.VectorEnv[Any, Any, Any]:
    """`gymnasium.make_vec`, with `vector_kwargs` in every mode.

    `gymnasium.make_vec` rejects `vector_kwargs` for environments that bring a vector
    environment of their own, as those of this package do; there, their entries are plain
    arguments.

    Args:
        id: Name of an environment, such as ``"RAPPrune-v0"``.
        num_envs: Number of environments, n.
        vectorization_mode: None for `RAPPruneVectorEnv` and its like, ``"sync"`` or
            ``"async"`` for gymnasium's vector environments of n single ones. With ``"async"``
            and a start method other than fork, each of the n processes loads a model.
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


def _actions(
    actions: npt.NDArray[np.int64], active: Flags, task: PruningTask, num_actions: int
) -> Counts:
    """The action of each active sub-environment, 0 for the others, (n,)."""
    given = np.asarray(actions)
    if given.shape != active.shape:
        raise InvalidRequestError(
            f"step() takes an array of {len(active)} actions, one for each sub-environment, not "
            f"one of shape {given.shape}."
        )
    whole = given.dtype.kind in "iu"
    wrong = active & ((given < 0) | (given >= num_actions)) if whole else active
    if wrong.any():
        raise task.unknown_action(given[wrong][0].item())
    return given.astype(np.int64) if active.all() else np.where(active, given, 0).astype(np.int64)


def _each_seed(seed: int | Sequence[int | None] | None, num_envs: int) -> Sequence[int | None]:
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
