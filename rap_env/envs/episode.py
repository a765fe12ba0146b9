"""One episode: a request, a plan that actions lower, and what the model measured of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from rap_env.envs.task import EpisodeStart, Measurement, PruningTask
from rap_env.ladder.observation import Observation, ObservedState
from rap_env.ladder.state import Lowering
from rap_env.ladder.steps import moved
from rap_env.request import Request


class Transition(NamedTuple):
    """The effect of an action, before it is applied.

    Attributes:
        change: What it does to the plan; None if the action is invalid.
        terminated: Whether the request fits afterwards.
        truncated: Whether there were too many invalid actions or steps.
        out_of_steps: Whether there were too many steps.
    """

    change: Lowering | None
    terminated: bool
    truncated: bool
    out_of_steps: bool

    @property
    def ends(self) -> bool:
        """Whether the episode ends."""
        return self.terminated or self.truncated


class Episode:
    """The state of one episode. It returns copies of its arrays.

    Args:
        task: The parts that all episodes of a model share.
        start: The request.
        positions: The levels to begin with; None for the unchanged model.

    Attributes:
        state: The plan and its bytes.
        levels: What `info` says of the plan, updated with it.
        measurement: What the model measured of the plan, or None if it was not measured.
        invalid_actions: Number of invalid actions.
        steps: Number of steps.
        over: Whether the episode has terminated or was truncated.
    """

    def __init__(
        self,
        task: PruningTask,
        start: EpisodeStart,
        positions: Sequence[int] | None = None,
    ) -> None:
        self.task, self.start = task, start
        self.state = start.costs.state(positions)
        self.levels = task.shown_levels(self.state.positions)
        self.measurement: Measurement | None = task.measured_start
        self.invalid_actions = self.steps = 0
        self.over = False
        self._seen = ObservedState(task.encoder, start.request, self.state)
        self._request = dict(vars(start.request))

    @property
    def delta_nll(self) -> float | None:
        """ΔNLL of the plan in nats per token, or None if it was not measured."""
        return None if self.measurement is None else self.measurement.delta_nll

    def transition(self, action: int) -> Transition:
        """The effect of an action."""
        task, state = self.task, self.state
        valid = action < len(state.positions) and state.is_valid(action)
        change = state.preview(action) if valid else None
        peak_bytes = state.peak_bytes if change is None else change.peak_bytes
        terminated = peak_bytes <= self.start.request.budget_bytes
        invalid_actions = self.invalid_actions + (change is None)
        truncated, out_of_steps = task.truncates(not terminated, invalid_actions, self.steps + 1)
        return Transition(change, terminated, truncated, out_of_steps)

    def rewarded(self, transition: Transition) -> tuple[Measurement, dict[str, float]]:
        """The measurement and the reward's terms of a step, before it is applied."""
        task, change, before = self.task, transition.change, math.nan
        if self.measurement is not None:
            before = self.measurement.delta_nll
        positions = task.lowest_positions
        if not transition.out_of_steps:
            moves = () if change is None else change.moves
            positions = np.array(moved(self.state.positions, moves))
        ends, fails = transition.ends, transition.truncated
        measured, terms = task.compute_rewards(
            positions[None],
            np.array([before]),
            np.array([ends]),
            np.array([fails]),
            lambda _number: self.start,
        )
        measurement = Measurement.of(measured[:, 0])
        assert measurement is not None
        return measurement, {name: float(values[0]) for name, values in terms.items()}

    def apply(self, transition: Transition, measurement: Measurement | None) -> None:
        """Take a step; `measurement` is that of its plan, or None if nothing was measured."""
        self.steps += 1
        self.over = transition.ends
        if transition.change is None:
            self.invalid_actions += 1
        else:
            self.measurement = None
            self._seen.apply(transition.change)
            for item, position in transition.change.moves:
                self.task.show_level(self.levels, item, position)
        if measurement is not None and not transition.out_of_steps:
            self.measurement = measurement

    def observation(self) -> Observation:
        """The current observation, in new arrays; see `usable_masks`."""
        observation = {key: array.copy() for key, array in self._seen.observation.items()}
        if self.over:
            usable_masks(observation["action_mask"])
        return observation

    def info(self, terms: dict[str, float]) -> dict[str, Any]:
        """The info dict, with the reward's `terms` by name."""
        task = self.task
        info: dict[str, Any] = {
            task.info_key: self.levels.copy(),
            "peak_bytes": self.state.peak_bytes,
            "request": self._request.copy(),
            "reward_terms": terms,
        }
        measurement = self.measurement
        if measurement is not None:
            info["nll"] = measurement.nll
            info[task.delta_key] = measurement.delta_nll
            if measurement.baseline_delta_nll is not None:
                info[f"baseline_{task.delta_key}"] = measurement.baseline_delta_nll
            if measurement.predicted:
                info["predicted"] = True
        if self.start.asked_budget_bytes is not None:
            info["infeasible"] = {"asked_budget_bytes": self.start.asked_budget_bytes}
        return info

    @classmethod
    def of_saved(cls, task: PruningTask, saved: Mapping[str, Any]) -> Self:
        """The episode that `saved` described; a plan that was measured is measured again."""
        request, positions = Request(**saved["request"]), saved["positions"]
        start = EpisodeStart(request, task.costs(request), saved["asked_budget_bytes"])
        episode, measurement = cls(task, start, positions), None
        if saved["measured"]:
            measurement = Measurement.of(task.measure(np.array([positions]))[:, 0])
        counters = (saved[name] for name in ("invalid_actions", "steps", "over"))
        episode.resume(measurement, *counters)
        return episode

    def saved(self) -> dict[str, Any]:
        """The state as plain JSON values."""
        return {
            "request": self._request.copy(),
            "asked_budget_bytes": self.start.asked_budget_bytes,
            "positions": self.state.positions.copy(),
            "measured": self.measurement is not None,
            "invalid_actions": self.invalid_actions,
            "steps": self.steps,
            "over": self.over,
        }

    def resume(
        self, measurement: Measurement | None, invalid_actions: int, steps: int, over: bool
    ) -> None:
        """Take over what the model measured of the plan, and counters."""
        self.measurement = measurement
        self.invalid_actions, self.steps, self.over = invalid_actions, steps, over


def usable_masks(masks: npt.NDArray[np.int8]) -> None:
    """Fill action masks without a valid action with ones, in place; shape (..., actions).

    Only an episode that is over has none left. A step that only starts the next episode (the
    next-step autoreset of gymnasium) ignores its action, but an agent still chooses one, and
    logits that are all masked give NaN.
    """
    masks[~masks.any(axis=-1)] = 1
