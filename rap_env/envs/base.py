"""What the environments of all versions share: one episode at a time, as Gymnasium has it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Generic

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.error import ResetNeeded

from rap_env.envs.config import RENDER_MODES, EnvConfig, check_render_mode
from rap_env.envs.episode import CostsT, Episode, EpisodeStart
from rap_env.envs.task import PruningTask, RewardedStep
from rap_env.observation import Observation
from rap_env.plan import Plan
from rap_env.render import Scene, render_ansi, render_rgb
from rap_env.request import Request

if TYPE_CHECKING:
    from rap_env.context.base import PruningContext


def reopen(kind: Callable[..., Any], context: PruningContext, arguments: Mapping[str, Any]) -> Any:
    """Make an environment again, from its copy or pickle; its context is shared or reopened."""
    return kind(context=context, **arguments)


class PruningEnv(gym.Env[Observation, np.int64], Generic[CostsT]):
    """An environment in which each action gives up something of a real language model.

    A copy or pickle has the state of the episode, the random generator and the workload. Copies
    share the context. A pickle holds the scores of a table; it names a live model, which is opened
    again.

    Attributes:
        context: The model with its memory arithmetic, scorer and importance.
        memory: The model's byte arithmetic.
    """

    config_type: ClassVar[type[EnvConfig]] = EnvConfig

    metadata = {"render_modes": list(RENDER_MODES), "render_fps": 2}  # noqa: RUF012 - gymnasium's

    def __init__(
        self,
        model: str = EnvConfig.model,
        *,
        render_mode: str | None = None,
        context: PruningContext | None = None,
        **settings: Any,
    ) -> None:
        self.render_mode = check_render_mode(render_mode)
        self._config = self.config_type.of(model=model, **settings)
        self._task: PruningTask[CostsT] = self.make_task(self._config, context)
        self.context, self.memory = self._task.context, self._task.memory
        self.observation_space = self._task.observations.space
        self.action_space = gym.spaces.Discrete(self._task.num_actions)
        self._episode: Episode[CostsT] | None = None
        self._left_after = 0

    @staticmethod
    @abstractmethod
    def make_task(config: Any, context: PruningContext | None) -> Any:
        """Make what environments of one model share."""

    @property
    def request(self) -> Request:
        """The request of this episode."""
        return self._current.start.request

    @property
    def plan(self) -> Plan:
        """The levels of all items now."""
        return self._current.state.plan_after()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode with the unchanged model.

        Args:
            seed: Seeds the workload; a workload with an order starts again.
            options: ``{"request": ...}`` sets the request, see Starting State.

        Raises:
            InvalidRequestError: The model cannot serve the request, or already fits it.
            InfeasibleBudgetError: Nothing can meet the budget in `options`, or that of any of 100
                drawn requests, and ``infeasible="error"``.
            UnknownNameError: There is no such option.
            NonFiniteScoreError: The model gave NaN or infinity.
        """
        super().reset(seed=seed)
        self._warn_of_limit()
        task = self._task
        if seed is not None:
            task.sampler.restart()
        start = task.start_episode(task.sampler, self.np_random, options)
        self._episode = self._new_episode(start)
        return self._episode.observation(), self._episode.info({})

    def step(self, action: np.int64 | int) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Take an action. If the model fails, the state does not change.

        Raises:
            ResetNeeded: No episode has begun, or it is over.
            UnknownNameError: There is no such action.
            NonFiniteScoreError: The model gave NaN or infinity.
        """
        episode, task = self._current, self._task
        if episode.over:
            raise ResetNeeded("The episode is over; call reset() before the next step().")
        index = self._index(action)
        state = episode.state
        invalid = not state.is_valid(index)
        peak_bytes = state.peak_bytes if invalid else state.peak_after(index)
        invalid_actions = episode.invalid_actions + invalid
        terminated = peak_bytes <= episode.start.request.budget_bytes
        steps = episode.steps + 1
        out_of_steps = not terminated and task.max_steps is not None and steps >= task.max_steps
        truncated = out_of_steps or (not terminated and invalid_actions >= task.max_invalid_actions)
        ends = terminated or truncated
        measurement = episode.measurement if invalid else None
        terms = task.reward.zeros()
        if ends or task.reward.pays_every_step:
            plan = task.lowest if out_of_steps else state.plan_after(index)
            step = RewardedStep(episode.start, plan, episode.delta_nll, ends)
            measured, terms = task.compute_rewards([step])[0]
            measurement = measurement if out_of_steps else measured
        terms["invalid_action"] = -task.invalid_action_penalty if invalid else 0.0
        if not invalid:  # only now, when nothing can fail any more
            episode.apply(index)
        episode.measurement = measurement
        episode.invalid_actions, episode.steps, episode.over = invalid_actions, steps, ends
        reward = sum(terms.values())
        return episode.observation(), reward, terminated, truncated, episode.info(terms)

    def action_masks(self) -> npt.NDArray[np.bool_]:
        """True for each action that is valid, shape (actions,)."""
        return self._current.observation()["action_mask"].astype(bool)

    def render(self) -> str | npt.NDArray[np.uint8] | None:
        """What is left, the bytes against the budget, and the ΔNLL, as text or as a picture."""
        if self.render_mode is None:
            gym.logger.warn("render() does nothing without a render_mode: 'ansi' or 'rgb_array'.")
            return None
        delta_nll, start = self._current.delta_nll, self._task.unchanged
        scene = Scene(self.memory, self.request, self.plan, delta_nll, start)
        return render_ansi(scene) if self.render_mode == "ansi" else render_rgb(scene)

    def __reduce__(self) -> tuple[Any, ...]:
        arguments = {**self._config.arguments, "render_mode": self.render_mode}
        episode, saved = self._episode, None
        if episode is not None:
            start = episode.start
            names = ["measurement", "invalid_actions", "steps", "over"]
            saved = {
                "start": (start.request, start.asked_budget_bytes),
                "actions": list(episode.actions),
                "attributes": {name: getattr(episode, name) for name in names},
            }
        names = ["spec", "action_space", "_np_random", "_np_random_seed", "_left_after"]
        state = {
            "attributes": {name: getattr(self, name) for name in names},
            "position": self._task.sampler.position,
            "episode": saved,
        }
        return reopen, (type(self), self.context, arguments), state

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state["attributes"])
        task, saved = self._task, state["episode"]
        task.sampler.restart(state["position"])
        if saved is not None:
            start = task.start_of(*saved["start"])
            self._episode = self._new_episode(start)
            for action in saved["actions"]:
                self._episode.apply(action)
            vars(self._episode).update(saved["attributes"])

    def _new_episode(self, start: EpisodeStart[CostsT]) -> Episode[CostsT]:
        task = self._task
        state = task.new_state(start)
        return Episode(start, task.measured_start, state, info_arrays=task.info_arrays)

    def _warn_of_limit(self) -> None:
        """Warn if two episodes in a row were left after the same number of steps.

        An environment does not know the wrappers around it. It sees only that a `TimeLimit` ends
        episodes before they are paid.
        """
        episode = self._episode
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

    @property
    def _current(self) -> Episode[CostsT]:
        if self._episode is None:
            raise ResetNeeded("No episode has begun; call reset() first.")
        return self._episode

    def _index(self, action: np.int64 | int) -> int:
        """The action as a Python integer."""
        whole = isinstance(action, np.integer) or type(action) is int
        if not whole:  # an array of one integer is accepted, a boolean is not
            array = np.asarray(action)
            whole = array.size == 1 and np.issubdtype(array.dtype, np.integer)
            action = array.item() if whole else action
        if not whole or not 0 <= action < self._task.num_actions:
            raise self._task.unknown_action(action)
        return int(action)
