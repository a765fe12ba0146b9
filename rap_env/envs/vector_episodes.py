"""The episodes of many environments as arrays: what `Episode` is for one, and their infos.

Gymnasium's form of infos: an entry ``key`` holds a value for each sub-environment, and ``_key``
says which sub-environments have it. Where one has none, numbers are 0 and objects None, as
gymnasium's own vector environments fill them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Generic

import numpy as np
import numpy.typing as npt
from gymnasium.vector.utils import create_empty_array

from rap_env.costs import Counts, Flags
from rap_env.envs.episode import CostsT, EpisodeStart, Measurement, usable_masks
from rap_env.envs.task import PruningTask, RewardedStep
from rap_env.observation import BYTES_OVER, Observation, request_features
from rap_env.plan import Plan
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
        measured: What the model measured of each plan, with the fields of `Measurement` as columns;
            NaN where there is no value, (n, 4).
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
        self.measured = np.full((num_envs, len(Measurement._fields)), np.nan)
        self.invalid_actions, self.steps = _zeros(num_envs), _zeros(num_envs)
        self.over = np.zeros(num_envs, dtype=bool)
        self.batch_size, self.seq_len_tokens = _zeros(num_envs), _zeros(num_envs)
        self.budget_bytes, self.asked_bytes = _zeros(num_envs), _zeros(num_envs)
        self._observation: Any = create_empty_array(task.observations.space, num_envs)

    def start(
        self,
        starts: Mapping[int, EpisodeStart[CostsT]],
        measurement: Measurement | None,
        plan: Plan = Plan(),
    ) -> None:
        """Start the episodes of some sub-environments, or restore them, all with a mask or plan.

        Args:
            starts: Request and costs of each one, by index.
            measurement: What the model measured of the plan, or None.
            plan: The mask or plan.
        """
        if not starts:
            return
        rows, costs = np.array(list(starts)), [start.costs for start in starts.values()]
        requests = [start.request for start in starts.values()]
        self.starts.update(starts)
        self.measured[rows] = np.nan if measurement is None else _numbers([measurement])
        self.invalid_actions[rows] = self.steps[rows] = 0
        self.over[rows] = False
        self.batch_size[rows] = [request.batch_size for request in requests]
        self.seq_len_tokens[rows] = [request.seq_len_tokens for request in requests]
        self.budget_bytes[rows] = [request.budget_bytes for request in requests]
        self.asked_bytes[rows] = [start.asked_budget_bytes or 0 for start in starts.values()]
        self.state.start(rows, costs, plan, self._observation)
        self._observation["request"][rows] = request_features(
            self._task.memory,
            batch_size=self.batch_size[rows],
            seq_len_tokens=self.seq_len_tokens[rows],
            budget_bytes=self.budget_bytes[rows],
            dense_peak_bytes=self.state.dense_peak_bytes[rows],
            kv_cache_bytes=np.array([one.kv_cache_bytes for one in costs]),
        )
        self._show_bytes_over()

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
        rows = np.flatnonzero(acts if task.reward.pays_every_step else ends)
        terms = {name: np.zeros(len(ends)) for name in task.reward.zeros()}
        measurements: dict[int, Measurement] = {}
        if len(rows):
            rewards = task.compute_rewards(self._rewarded(rows, step, ends))
            for index, (measurement, shares) in zip(rows.tolist(), rewards, strict=True):
                if not step.out_of_steps[index]:
                    measurements[index] = measurement
                for name, value in shares.items():
                    terms[name][index] = value
        terms["invalid_action"] = np.where(step.invalid, -task.invalid_action_penalty, 0.0)
        return terms, measurements

    def _rewarded(self, rows: Counts, step: VectorStep, ends: Flags) -> list[RewardedStep]:
        """The steps of some sub-environments that are rewarded."""
        plans = self.state.plans(rows, step.actions[rows])
        return [
            RewardedStep(
                self.starts[index],
                self._task.lowest if step.out_of_steps[index] else plan,
                self.delta_nll(index),
                bool(ends[index]),
            )
            for index, plan in zip(rows.tolist(), plans, strict=True)
        ]

    def apply(self, step: VectorStep, measurements: Mapping[int, Measurement]) -> None:
        """Apply a step."""
        self.measured[step.valid] = np.nan
        if measurements:
            self.measured[list(measurements)] = _numbers(measurements.values())
        self.invalid_actions += step.invalid
        self.steps += step.valid | step.invalid
        self.state.apply(step.actions, step.valid, step.peak_bytes, self._observation)
        self._show_bytes_over()

    def _show_bytes_over(self) -> None:
        over_bytes = np.maximum(0, self.state.peak_bytes - self.budget_bytes)
        dense_peak_bytes = np.maximum(1, self.state.dense_peak_bytes)  # 0 before the first episode
        shares = np.minimum(1.0, over_bytes / dense_peak_bytes)
        self._observation["request"][:, BYTES_OVER] = shares

    def delta_nll(self, index: int) -> float | None:
        """ΔNLL of a plan in nats per token, or None if it was not measured."""
        nll, delta_nll, *_ = self.measured[index].tolist()
        return None if math.isnan(nll) else delta_nll

    def observation(self) -> Observation:
        """The current observations, in new arrays with n rows; see `usable_masks`."""
        observation = {key: array.copy() for key, array in self._observation.items()}
        if self.over.any():
            usable_masks(observation["action_mask"])
        return observation

    def _observations_of(self, rows: Counts) -> list[Observation]:
        """The last observations of episodes that are over, in new arrays."""
        seen = {key: array[rows] for key, array in self._observation.items()}
        usable_masks(seen["action_mask"])
        return [{key: array[n] for key, array in seen.items()} for n in range(len(rows))]

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
            self.state.info_key: self.state.infos(np.array([index]))[0],
            "measured": self.delta_nll(index) is not None,
            "invalid_actions": int(self.invalid_actions[index]),
            "steps": int(self.steps[index]),
            "over": bool(self.over[index]),
        }

    def set_state(self, index: int, state: Mapping[str, Any]) -> None:
        """Restore what `get_state` returned; an unknown score is measured again."""
        plan = self.state.saved_plan(state)
        start = self._task.start_of(Request(**state["request"]), state["asked_budget_bytes"])
        measurement = self._task.measure([plan])[0] if state["measured"] else None
        self.start({index: start}, measurement, plan)
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
        done = state.info_array() if arrays else _objects(shown, state.infos)
        infos = {
            **_entry(state.info_key, done, shown),
            **_entry("peak_bytes", state.peak_bytes, shown),
            **_entry("request", _entries(request, shown), shown),
            **_entry("reward_terms", _entries(terms, rewarded & shown), shown),
            **_measured(self.measured, shown),
        }
        clipped = shown & (self.asked_bytes > 0)
        if clipped.any():
            asked = _entries({"asked_budget_bytes": self.asked_bytes}, clipped)
            infos.update(_entry("infeasible", asked, clipped))
        return infos

    def final_infos(self, done: Flags, terms: Terms) -> dict[str, Any]:
        """The last observations and infos of episodes that end in a step with autoreset."""
        observations = _objects(done, self._observations_of)
        infos = self.infos(done, terms, done)
        return {**_entry("final_obs", observations, done), **_entry("final_info", infos, done)}


def _numbers(measurements: Iterable[Measurement]) -> npt.NDArray[np.float64]:
    """Measurements as rows of `VectorEpisodes.measured`."""
    return np.array(list(measurements), dtype=np.float64)  # None becomes NaN


def _measured(measured: npt.NDArray[np.float64], shown: Flags) -> dict[str, Any]:
    """The infos about plans that were measured."""
    known = shown & ~np.isnan(measured[:, 0])
    if not known.any():
        return {}
    compared = known & ~np.isnan(measured[:, 3])
    nll, delta_nll, predicted, baseline_delta_nll = np.where(known[:, None], measured, 0.0).T
    infos = {**_entry("nll", nll, known), **_entry("loss", delta_nll, known)}
    if compared.any():
        baseline_delta_nll = np.where(compared, baseline_delta_nll, 0.0)
        infos.update(_entry("baseline_loss", baseline_delta_nll, compared))
    if predicted.any():
        infos.update(_entry("predicted", predicted > 0, predicted > 0))
    return infos


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


def _objects(
    has_it: Flags, values_of: Callable[[Counts], Sequence[Any]]
) -> npt.NDArray[np.object_]:
    """An array with an object for each sub-environment that has one, None for the others."""
    array, rows = np.empty(len(has_it), dtype=object), np.flatnonzero(has_it)
    for index, value in zip(rows.tolist(), values_of(rows), strict=True):
        array[index] = value
    return array


def _zeros(count: int) -> Counts:
    return np.zeros(count, dtype=np.int64)
