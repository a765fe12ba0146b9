"""The episodes of many environments as arrays: what `Episode` is for one, and their infos.

Gymnasium's form of infos: an entry ``key`` holds a value for each sub-environment, and ``_key``
says which sub-environments have it. Where one has none, numbers are 0 and objects None, as
gymnasium's own vector environments fill them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Generic

import numpy as np
import numpy.typing as npt
from gymnasium.vector.utils import create_empty_array

from rap_env.blocks import BlockMask
from rap_env.costs import Counts, Flags
from rap_env.envs.episode import CostsT, EpisodeStart, Measurement, usable_masks
from rap_env.envs.task import PruningTask, RewardedStep
from rap_env.observation import BYTES_OVER, Observation
from rap_env.plan import MaskOrPlan
from rap_env.request import Request

Terms = dict[str, npt.NDArray[np.float64]]
"""A reward's terms by name, (n,) each."""


@dataclass(frozen=True, eq=False)
class VectorStep:
    """The effect of one action in each of n sub-environments, before it is applied.

    Attributes:
        actions: The action of each sub-environment, (n,); 0 where it does not act.
        valid: Whether it acts and the action changes something, (n,).
        invalid: Whether it acts and the action changes nothing, (n,).
        peak_bytes: Peak bytes afterwards, (n,).
        terminated: Whether the request fits afterwards, (n,).
        truncated: Whether there were too many invalid actions or steps, (n,).
        out_of_steps: Whether there were too many steps, (n,).
    """

    actions: Counts
    valid: Flags
    invalid: Flags
    peak_bytes: Counts
    terminated: Flags
    truncated: Flags
    out_of_steps: Flags


class VectorEpisodes(Generic[CostsT]):
    """The episodes of n sub-environments.

    Attributes:
        starts: Request and costs of each sub-environment that has started an episode, by index.
        state: What each one has done to the model.
        measurements: What the model measured of each plan, or None if it was not measured.
        batch_size: Batch size of each request, (n,).
        seq_len_tokens: Length of each request, (n,).
        budget_bytes: Budget of each request, (n,).
        asked_bytes: Budgets before they were clipped, 0 where they were not, (n,).
        invalid_actions: Number of invalid actions, (n,).
        steps: Steps of each episode, (n,).
        over: Whether the episode has terminated or was truncated, (n,).
    """

    def __init__(self, num_envs: int, task: PruningTask[CostsT]) -> None:
        self._task = task
        self._rows = np.arange(num_envs)
        self.starts: dict[int, EpisodeStart[CostsT]] = {}
        self.state = task.new_vector_state(num_envs)
        self.measurements: list[Measurement | None] = [None] * num_envs
        self.invalid_actions, self.steps = _zeros(num_envs), _zeros(num_envs)
        self.over = np.zeros(num_envs, dtype=bool)
        self.batch_size, self.seq_len_tokens = _zeros(num_envs), _zeros(num_envs)
        self.budget_bytes, self.asked_bytes = _zeros(num_envs), _zeros(num_envs)
        self._observation: Any = create_empty_array(task.observations.space, num_envs)

    def start(
        self,
        index: int,
        start: EpisodeStart[CostsT],
        measurement: Measurement | None,
        plan: MaskOrPlan = BlockMask(),
    ) -> None:
        """Start the episode of one sub-environment, or restore one with its mask or plan."""
        request = start.request
        self.starts[index], self.measurements[index] = start, measurement
        self.invalid_actions[index] = self.steps[index] = 0
        self.over[index] = False
        self.budget_bytes[index] = request.budget_bytes
        self.batch_size[index] = request.batch_size
        self.seq_len_tokens[index] = request.seq_len_tokens
        self.asked_bytes[index] = start.asked_budget_bytes or 0
        self.state.start(index, start.costs, plan)
        observation = self._task.observations.build(request, plan)
        for key, array in observation.items():
            self._observation[key][index] = array

    def plan(self, actions: Counts, active: Flags) -> VectorStep:
        """The effect of `actions` where `active`; 0 elsewhere, both (n,)."""
        possible = self._observation["action_mask"][self._rows, actions] > 0
        valid, invalid = active & possible, active & ~possible
        peak = self.state.peak_after(actions, valid)
        terminated = active & (peak <= self.budget_bytes)
        invalid_actions = self.invalid_actions + invalid
        goes_on, limit = active & ~terminated, self._task.max_steps
        out_of_steps = goes_on & (False if limit is None else self.steps + 1 >= limit)
        truncated = out_of_steps | (goes_on & (invalid_actions >= self._task.max_invalid_actions))
        return VectorStep(actions, valid, invalid, peak, terminated, truncated, out_of_steps)

    def compute_rewards(self, step: VectorStep) -> tuple[Terms, dict[int, Measurement]]:
        """The reward's terms of a step, (n,) each, and the measurements behind them by index."""
        task = self._task
        ends, acts = step.terminated | step.truncated, step.valid | step.invalid
        where = np.flatnonzero(acts if task.reward.pays_every_step else ends).tolist()
        steps = [self._rewarded(index, step, bool(ends[index])) for index in where]
        rewards = task.compute_rewards(steps) if steps else []
        measurements: dict[int, Measurement] = {}
        terms = {name: np.zeros(len(ends)) for name in task.reward.zeros()}
        for index, (measurement, shares) in zip(where, rewards, strict=True):
            if not step.out_of_steps[index]:
                measurements[index] = measurement
            for name, value in shares.items():
                terms[name][index] = value
        terms["invalid_action"] = np.where(step.invalid, -task.invalid_action_penalty, 0.0)
        return terms, measurements

    def _rewarded(self, index: int, step: VectorStep, ends: bool) -> RewardedStep:
        before, task = self.measurements[index], self._task
        plan = task.lowest
        if not step.out_of_steps[index]:
            plan = self.state.plan_after(index, int(step.actions[index]))
        delta_nll_before = None if before is None else before.delta_nll
        return RewardedStep(self.starts[index], plan, delta_nll_before, ends)

    def apply(self, step: VectorStep, measurements: Mapping[int, Measurement]) -> None:
        """Apply a step."""
        for index in np.flatnonzero(step.valid).tolist():
            self.measurements[index] = None
        for index, measurement in measurements.items():
            self.measurements[index] = measurement
        self.invalid_actions += step.invalid
        self.steps += step.valid | step.invalid
        self.state.apply(step.actions, step.valid, step.peak_bytes, self._observation)
        over_bytes = np.maximum(0, step.peak_bytes - self.budget_bytes)
        shares = np.minimum(1.0, over_bytes / self.state.dense_peak_bytes)
        self._observation["request"][:, BYTES_OVER] = shares

    def observation(self) -> Observation:
        """The current observations, in new arrays with n rows; see `usable_masks`."""
        observation = {key: array.copy() for key, array in self._observation.items()}
        if self.over.any():
            usable_masks(observation["action_mask"])
        return observation

    def observation_of(self, index: int) -> Observation:
        """The current observation of one sub-environment, in new arrays."""
        observation = {key: array[index].copy() for key, array in self._observation.items()}
        if self.over[index]:
            usable_masks(observation["action_mask"])
        return observation

    def action_masks(self) -> Flags:
        """True for each action that is valid, (n, actions); see `usable_masks`."""
        masks = self._observation["action_mask"].copy()
        usable_masks(masks)
        return np.asarray(masks > 0)

    def get_state(self, index: int) -> dict[str, Any]:
        """The state of one sub-environment's episode, as plain JSON values."""
        return {
            "request": asdict(self.starts[index].request),
            "asked_budget_bytes": self.starts[index].asked_budget_bytes,
            self.state.info_key: self.state.info(index),
            "measured": self.measurements[index] is not None,
            "invalid_actions": int(self.invalid_actions[index]),
            "steps": int(self.steps[index]),
            "over": bool(self.over[index]),
        }

    def set_state(self, index: int, state: Mapping[str, Any]) -> None:
        """Restore what `get_state` returned; an unknown score is measured again."""
        plan = self.state.saved_plan(state)
        start = self._task.start_of(Request(**state["request"]), state["asked_budget_bytes"])
        measurement = self._task.measure([plan])[0] if state["measured"] else None
        self.start(index, start, measurement, plan)
        self.invalid_actions[index], self.steps[index] = state["invalid_actions"], state["steps"]
        self.over[index] = state["over"]

    def infos(self, shown: Flags, terms: Terms, rewarded: Flags) -> dict[str, Any]:
        """The infos that the sub-environments `shown` would return as single environments.

        Args:
            shown: Sub-environments to include, (n,).
            terms: The reward's terms by name, (n,) each.
            rewarded: Sub-environments that have such terms, (n,).
        """
        request = {
            "batch_size": self.batch_size,
            "seq_len_tokens": self.seq_len_tokens,
            "budget_bytes": self.budget_bytes,
        }
        state, arrays = self.state, self._task.info_arrays
        done = state.info_array() if arrays else _objects(shown, state.info)
        infos = {
            **_entry(state.info_key, done, shown),
            **_entry("peak_bytes", state.peak_bytes, shown),
            **_entry("request", _entries(request, shown), shown),
            **_entry("reward_terms", _entries(terms, rewarded & shown), shown),
            **_measured(self.measurements, shown),
        }
        clipped = shown & (self.asked_bytes > 0)
        if clipped.any():
            asked = _entries({"asked_budget_bytes": self.asked_bytes}, clipped)
            infos.update(_entry("infeasible", asked, clipped))
        return infos

    def final_infos(self, done: Flags, terms: Terms) -> dict[str, Any]:
        """The last observations and infos of episodes that end in a step with autoreset."""
        observations = _objects(done, self.observation_of)
        infos = self.infos(done, terms, done)
        return {**_entry("final_obs", observations, done), **_entry("final_info", infos, done)}


def _measured(measurements: list[Measurement | None], shown: Flags) -> dict[str, Any]:
    """The infos about plans that were measured."""
    pairs = zip(measurements, shown.tolist(), strict=True)
    found = [measurement if show else None for measurement, show in pairs]
    known = np.array([one is not None for one in found])
    if not known.any():
        return {}
    predicted = np.array([one is not None and one.predicted for one in found])
    baselines = [None if one is None else one.baseline_delta_nll for one in found]
    compared = np.array([value is not None for value in baselines])
    nll = np.array([0.0 if one is None else one.nll for one in found])
    delta_nll = np.array([0.0 if one is None else one.delta_nll for one in found])
    baseline_delta_nll = np.array([value or 0.0 for value in baselines])
    return {
        **_entry("nll", nll, known),
        **_entry("loss", delta_nll, known),
        **(_entry("baseline_loss", baseline_delta_nll, compared) if compared.any() else {}),
        **(_entry("predicted", predicted, predicted) if predicted.any() else {}),
    }


def _entry(key: str, value: Any, has_it: Flags) -> dict[str, Any]:
    """A value for each sub-environment, and the flags that say which ones have it."""
    if isinstance(value, np.ndarray) and value.dtype != object:
        value = value * has_it.reshape(-1, *[1] * (value.ndim - 1))  # 0 where there is none
    return {key: value, f"_{key}": has_it.copy()}


def _entries(values: Mapping[str, npt.NDArray[Any]], has_it: Flags) -> dict[str, Any]:
    infos: dict[str, Any] = {}
    if has_it.any():
        for key, value in values.items():
            infos.update(_entry(key, value, has_it))
    return infos


def _objects(has_it: Flags, value_of: Callable[[int], Any]) -> npt.NDArray[np.object_]:
    """An array with an object for each sub-environment that has one, None for the others."""
    array = np.empty(len(has_it), dtype=object)
    for index in np.flatnonzero(has_it).tolist():
        array[index] = value_of(index)
    return array


def _zeros(count: int) -> Counts:
    return np.zeros(count, dtype=np.int64)
