"""What the environments of both tasks share: one episode at a time, as Gymnasium has it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.error import ResetNeeded

from rap_env.context.base import PruningContext
from rap_env.envs.config import RENDER_MODES, EnvConfig, check_render_mode
from rap_env.envs.episode import Episode
from rap_env.envs.task import PruningTask, StartQueue
from rap_env.ladder.observation import Observation
from rap_env.plan import Plan
from rap_env.render import Scene, render_ansi, render_rgb
from rap_env.request import Request


def reopen(kind: Callable[..., Any], context: PruningContext, arguments: Mapping[str, Any]) -> Any:
    """Make an environment again, from its copy or pickle; its context is shared or reopened."""
    return kind(context=context, **arguments)


class PruningEnv(gym.Env[Observation, np.int64]):
    """An environment in which each action gives up something of a real language model.

    A copy or pickle has the state of the episode, the random generator and the workload.
    Copies share the context. A pickle holds the scores of a table; it names a live model,
    which is opened again.

    Attributes:
        context: The model with its memory arithmetic, scorer and importance.
        memory: The model's byte arithmetic.
        encoder: Encodes its observations.
        ladder: The items, in the order of the actions, and the levels of each.
        current: The current episode; None before the first one.
        sampler: Draws requests.
        num_actions: Actions that `step` takes; those past the items are invalid.
    """

    config_type: ClassVar[type[EnvConfig]]
    _queue: StartQueue | None = None

    metadata = {"render_modes": list(RENDER_MODES), "render_fps": 2}  # noqa: RUF012 - gymnasium's

    def __init__(
        self,
        model: str = EnvConfig.model,
        *,
        render_mode: str | None = None,
        context: PruningContext | None = None,
        **settings: Any,
    ) -> None:
        render_mode = check_render_mode(render_mode)
        self._config = self.config_type.of(model=model, **settings)
        self._use(PruningTask(self._config, context), render_mode)

    @classmethod
    def sharing(cls, task: PruningTask, render_mode: str | None) -> Self:
        """An environment that shares its task with others; it cannot be pickled by itself."""
        env = cls.__new__(cls)
        env._use(task, render_mode)
        return env

    def _use(self, task: PruningTask, render_mode: str | None) -> None:
        self.render_mode = render_mode
        self.context, self.memory = task.context, task.memory
        self.delta_key, self.encoder, self.ladder = task.delta_key, task.encoder, task.ladder
        self.sampler = task.sampler
        self.observation_space = task.encoder.space
        self.num_actions = len(task.ladder)
        self.action_space = gym.spaces.Discrete(self.num_actions)
        self._task = task
        self.current: Episode | None = None
        self._left_after = 0

    @property
    def np_random(self) -> np.random.Generator:
        """The generator of requests, in the state that it has without what was drawn ahead."""
        if self._queue is not None:
            self._queue.rewind()
        return super().np_random

    @np_random.setter
    def np_random(self, generator: np.random.Generator) -> None:
        self._queue = None
        gym.Env.np_random.fset(self, generator)  # type: ignore[attr-defined]

    @property
    def request(self) -> Request:
        """The request of this episode."""
        return self.episode.start.request

    @property
    def plan(self) -> Plan:
        """The levels of all items now."""
        return self.episode.state.plan

    @property
    def episode(self) -> Episode:
        """The current episode; a `ResetNeeded` before the first one."""
        if self.current is None:
            raise ResetNeeded("No episode has begun; call reset() first.")
        return self.current

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode with the unchanged model.

        Args:
            seed: Seeds the workload.
            options: ``{"request": ...}`` sets the request, see Starting State.

        Raises:
            InvalidRequestError: The model cannot serve the request, or already fits it.
            InfeasibleBudgetError: Nothing can meet the budget in `options`, or that of any of
                100 drawn requests, and ``infeasible="error"``.
            UnknownNameError: There is no such option.
            NonFiniteScoreError: The model gave NaN or infinity.
        """
        if seed is not None:
            super().reset(seed=seed)
            self._queue = None
        self._warn_of_limit()
        if options is None:
            if self._queue is None:
                self._queue = StartQueue(self._task, self.np_random)
            start = self._queue.next()
        else:
            start = self._task.start_episode(self.np_random, options)
        episode = self.current = Episode(self._task, start)
        return episode.observation(), episode.info({})

    def step(self, action: np.int64 | int) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Take an action. If the model fails, the state does not change.

        Raises:
            ResetNeeded: No episode has begun, or it is over.
            UnknownNameError: There is no such action.
            NonFiniteScoreError: The model gave NaN or infinity.
        """
        episode = self.episode
        if episode.over:
            raise ResetNeeded("The episode is over; call reset() before the next step().")
        transition, task = episode.transition(self._index(action)), self._task
        measurement, terms = None, task.reward.zeros()
        if transition.ends or task.reward.pays_every_step:
            measurement, terms = episode.rewarded(transition)
        terms["invalid_action"] = 0.0 if transition.change else -task.invalid_action_penalty
        episode.apply(transition, measurement)  # only now, when nothing can fail any more
        reward, info = sum(terms.values()), episode.info(terms)
        return episode.observation(), reward, transition.terminated, transition.truncated, info

    def action_masks(self) -> npt.NDArray[np.bool_]:
        """True for each action that is valid, shape (actions,)."""
        return self.episode.observation()["action_mask"].astype(bool)

    def render(self) -> str | npt.NDArray[np.uint8] | None:
        """What is left, the bytes against the budget, and the ΔNLL, as text or as a picture."""
        if self.render_mode is None:
            gym.logger.warn("render() does nothing without a render_mode: 'ansi' or 'rgb_array'.")
            return None
        scene = Scene(self.memory, self.request, self.plan, self.episode.delta_nll)
        return render_ansi(scene) if self.render_mode == "ansi" else render_rgb(scene)

    def get_state(self) -> dict[str, Any]:
        """The state as JSON values: generator and episode."""
        return {
            "generator": self.np_random.bit_generator.state,
            "episode": None if self.current is None else self.current.saved(),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `get_state` returned; an unknown score is measured again.

        Raises:
            RapError: The model does not have those items or cannot serve that request.
        """
        self.np_random.bit_generator.state = state["generator"]
        saved = state["episode"]
        self.current = None if saved is None else Episode.of_saved(self._task, saved)

    def __reduce__(self) -> tuple[Any, ...]:
        arguments = {**self._config.arguments, "render_mode": self.render_mode}
        return reopen, (type(self), self.context, arguments), self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        return {
            "spec": self.spec,
            "action_space": self.action_space,
            "seed": self.np_random_seed,
            "left_after": self._left_after,
            "state": self.get_state(),
        }

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.spec, self.action_space = state["spec"], state["action_space"]
        if state["seed"] < 0:  # the generator was set by hand
            self.np_random = np.random.default_rng()
        else:
            super().reset(seed=state["seed"])
        self.set_state(state["state"])
        self._left_after = state["left_after"]

    def _warn_of_limit(self) -> None:
        """Warn if two episodes in a row were left after the same number of steps.

        An environment does not know the wrappers around it. It sees only that a `TimeLimit`
        ends episodes before they are paid.
        """
        episode = self.current
        if episode is None or episode.over or episode.steps < 2:
            return
        if self._left_after == episode.steps:
            gym.logger.warn(
                f"Two episodes in a row were reset after {episode.steps} steps, before their end "
                "and without their reward. If max_episode_steps or a TimeLimit does this, not "
                "finishing has the best return: pass max_steps="
                f"{episode.steps} to the environment instead, which pays for such episodes."
            )
        self._left_after = episode.steps

    def _index(self, action: np.int64 | int) -> int:
        """The action as a Python integer."""
        whole = isinstance(action, np.integer) or type(action) is int
        if not whole:  # an array of one integer is accepted, a boolean is not
            array = np.asarray(action)
            whole = array.size == 1 and np.issubdtype(array.dtype, np.integer)
            action = array.item() if whole else action
        if not whole or not 0 <= action < self.num_actions:
            raise self._task.unknown_action(action)
        return int(action)
