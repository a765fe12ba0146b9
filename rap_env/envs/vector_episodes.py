"""The episodes of many environments as arrays: what `Episode` is for one, and their infos.

Gymnasium's form of infos: an entry ``key`` holds a value for each sub-environment, and
``_key`` says which sub-environments have it. Where one has none, numbers are 0 and objects
None, as gymnasium's own vector environments fill them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from rap_env.envs.episode import Episode, usable_masks
from rap_env.envs.task import EpisodeStart, Measurement, PruningTask, RewardedStep, ShownLevels
from rap_env.ladder.items import Counts
from rap_env.ladder.observation import Observation, ObservedPlans

Flags = npt.NDArray[np.bool_]


class VectorStep(NamedTuple):
    """The effect of one action in each of n sub-environments, before it is applied.

    Attributes:
        positions: The positions of the levels afterwards, (n, items).
        peak_bytes: Peak bytes afterwards, (n,).
        valid: Whether a sub-environment acts and the action changes something, (n,).
        invalid: Whether it acts and the action changes nothing, (n,).
        terminated: Whether the request fits afterwards, (n,).
        truncated: Whether there were too many invalid actions or steps, (n,).
        out_of_steps: Whether there were too many steps, (n,).
    """

    positions: Counts
    peak_bytes: Counts
    valid: Flags
    invalid: Flags
    terminated: Flags
    truncated: Flags
    out_of_steps: Flags


class VectorEpisodes:
    """The episodes of n sub-environments.

    Attributes:
        starts: Request and bytes of each sub-environment that has started an episode, by
            index.
        positions: The positions of the levels of each plan, (n, items).
        peak_bytes: Peak bytes of each request now, (n,).
        measured: What the model measured of each plan, with the fields of `Measurement` as
            columns; NaN where there is no value, (n, 4).
        requests: Batch sizes, lengths and budgets, and the budgets before they were clipped,
            0 where they were not, (n,) each.
        invalid_actions: Number of invalid actions, (n,).
        steps: Steps of each episode, (n,).
        over: Whether the episode has terminated or was truncated, (n,).
    """

    def __init__(self, num_envs: int, task: PruningTask) -> None:
        self._task, self._rows = task, np.arange(num_envs)
        self._plans = ObservedPlans(task.encoder, num_envs)
        self.starts: dict[int, EpisodeStart] = {}
        self.positions = np.zeros((num_envs, len(task.ladder)), dtype=np.int64)
        self.peak_bytes, self.invalid_actions, self.steps = np.zeros((3, num_envs), dtype=np.int64)
        self.measured = np.full((num_envs, len(Measurement._fields)), np.nan)
        self.over = np.zeros(num_envs, dtype=bool)
        names = ("batch_size", "seq_len_tokens", "budget_bytes", "asked_budget_bytes")
        self.requests = {name: np.zeros(num_envs, dtype=np.int64) for name in names}
        self._levels: list[ShownLevels] = [[] for _ in range(num_envs)]

    def start(self, starts: Mapping[int, EpisodeStart]) -> None:
        """Start the episodes of some sub-environments, given by index."""
        if not starts:
            return
        rows, task = np.array(list(starts)), self._task
        self._plans.put(rows, [start.request for start in starts.values()])
        self.starts.update(starts)
        self.positions[rows] = 0
        self.invalid_actions[rows] = self.steps[rows] = 0
        self.over[rows] = False
        self.peak_bytes[rows] = self._plans.costs.dense_peak_bytes[rows]
        self.measured[rows] = np.array(task.measured_start, dtype=np.float64)
        native = task.shown_levels([0] * len(task.ladder))
        for row, start in starts.items():
            self._levels[row] = native.copy()
            for name, value in vars(start.request).items():
                self.requests[name][row] = value
            self.requests["asked_budget_bytes"][row] = start.asked_budget_bytes or 0

    def resume(self, row: int, episode: Episode | None) -> None:
        """Continue an episode in a sub-environment; None changes nothing."""
        if episode is None:
            return
        self.start({row: episode.start})
        self.positions[row] = episode.state.positions
        self.peak_bytes[row] = episode.state.peak_bytes
        self._levels[row] = episode.levels.copy()
        self.measured[row] = np.nan
        if episode.measurement is not None:
            self.measured[row] = np.array(episode.measurement, dtype=np.float64)
        self.invalid_actions[row], self.steps[row] = episode.invalid_actions, episode.steps
        self.over[row] = episode.over

    def episode(self, row: int) -> Episode:
        """The episode of a sub-environment, for a single environment to continue."""
        episode = Episode(self._task, self.starts[row], self.positions[row].tolist())
        counters = int(self.invalid_actions[row]), int(self.steps[row]), bool(self.over[row])
        episode.resume(self._measurement(row), *counters)
        return episode

    def plan(self, actions: Counts, active: Flags) -> VectorStep:
        """The effect of `actions` where `active`; 0 elsewhere, both (n,)."""
        costs, rows = self._plans.costs, self._rows
        after = costs.lowered(self.positions, actions, rows)
        after[~active] = self.positions[~active]
        valid = (after != self.positions).any(axis=1)
        invalid = active & ~valid
        peaks = costs.peaks(after, rows)
        over_budget = active & (peaks > self.requests["budget_bytes"])
        truncated, out_of_steps = self._task.truncates(
            over_budget, self.invalid_actions + invalid, self.steps + 1
        )
        fits = active & ~over_budget
        return VectorStep(after, peaks, valid, invalid, fits, truncated, out_of_steps)

    def rewarded(self, step: VectorStep) -> dict[int, RewardedStep]:
        """The steps of the sub-environments that are rewarded, by index."""
        task, ends = self._task, step.terminated | step.truncated
        acts = step.valid | step.invalid
        rows = np.flatnonzero(acts if task.reward.pays_every_step else ends).tolist()
        rewarded = {}
        for row in rows:
            measurement, plan = self._measurement(row), task.ladder.lowest
            if not step.out_of_steps[row]:
                plan = task.ladder.plan(step.positions[row].tolist())
            rewarded[row] = RewardedStep(
                self.starts[row],
                plan,
                None if measurement is None else measurement.delta_nll,
                bool(ends[row]),
                bool(step.truncated[row]),
            )
        return rewarded

    def apply(self, step: VectorStep, measurements: Mapping[int, Measurement]) -> None:
        """Apply a step with the measurements of some plans, by index."""
        self.measured[step.valid] = np.nan
        for row, measurement in measurements.items():
            if not step.out_of_steps[row]:
                # None becomes NaN.
                self.measured[row] = np.array(measurement, dtype=np.float64)
        self.invalid_actions += step.invalid
        self.steps += step.valid | step.invalid
        rows, items = np.nonzero(step.positions != self.positions)
        self.positions, self.peak_bytes = step.positions, step.peak_bytes
        moved = self.positions[rows, items].tolist()
        for row, item, position in zip(rows.tolist(), items.tolist(), moved, strict=True):
            self._task.show_level(self._levels[row], item, position)

    def observation(self) -> Observation:
        """The current observations, in new arrays with n rows; see `usable_masks`."""
        observation = self._plans.observe(self.positions, self._rows, self.peak_bytes)
        if self.over.any():
            usable_masks(observation["action_mask"])
        return observation

    def _measurement(self, row: int) -> Measurement | None:
        """What the model measured of a plan, or None."""
        nll, delta_nll, predicted, baseline = self.measured[row].tolist()
        if math.isnan(nll):
            return None
        return Measurement(
            nll, delta_nll, bool(predicted), None if math.isnan(baseline) else baseline
        )

    def infos(
        self, shown: Flags, terms: Mapping[str, npt.NDArray[np.float64]], rewarded: Flags
    ) -> dict[str, Any]:
        """The infos that the sub-environments `shown` would return as single environments.

        Args:
            shown: Sub-environments to include, (n,).
            terms: The reward's terms by name, (n,) each.
            rewarded: Sub-environments that have such terms, (n,).
        """
        task, request = self._task, dict(self.requests)
        asked = {"asked_budget_bytes": request.pop("asked_budget_bytes")}
        levels: Any = self.positions.astype(np.int8)
        if not task.info_arrays:
            levels = _objects(shown, self._levels)
        infos = {
            **_entry(task.info_key, levels, shown),
            **_entry("peak_bytes", self.peak_bytes, shown),
            **_entry("request", _entries(request, shown), shown),
            **_entry("reward_terms", _entries(terms, rewarded & shown), shown),
            **self._measured_infos(shown),
        }
        clipped = shown & (asked["asked_budget_bytes"] > 0)
        if clipped.any():
            infos.update(_entry("infeasible", _entries(asked, clipped), clipped))
        return infos

    def _measured_infos(self, shown: Flags) -> dict[str, Any]:
        """The infos about plans that were measured."""
        known, key = shown & ~np.isnan(self.measured[:, 0]), self._task.delta_key
        if not known.any():
            return {}
        measured = np.where(np.isnan(self.measured), 0.0, self.measured)
        nll, delta_nll, predicted, baseline = measured.T
        infos = {**_entry("nll", nll, known), **_entry(key, delta_nll, known)}
        compared = known & ~np.isnan(self.measured[:, 3])
        if compared.any():
            infos.update(_entry(f"baseline_{key}", baseline, compared))
        flagged = known & (predicted > 0)
        if flagged.any():
            infos.update(_entry("predicted", flagged, flagged))
        return infos

    def final_infos(
        self, done: Flags, terms: Mapping[str, npt.NDArray[np.float64]]
    ) -> dict[str, Any]:
        """The last observations and infos of episodes that end in a step with autoreset."""
        seen = self.observation()
        observations = [{key: array[row] for key, array in seen.items()} for row in self._rows]
        infos = self.infos(done, terms, done)
        return {
            **_entry("final_obs", _objects(done, observations), done),
            **_entry("final_info", infos, done),
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


def _objects(has_it: Flags, values: Sequence[Any]) -> npt.NDArray[np.object_]:
    """An array with a copy of an object for each sub-environment that has one, else None."""
    array = np.empty(len(has_it), dtype=object)
    for row in np.flatnonzero(has_it).tolist():
        array[row] = values[row].copy()
    return array
