"""The episodes of many environments as arrays: what `Episode` is for one, and their infos.

Gymnasium's form of infos: an entry ``key`` holds a value for each sub-environment, and ``_key``
says which sub-environments have it. Where one has none, numbers are 0 and objects None, as
gymnasium's own vector environments fill them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from rap_env.envs.episode import usable_masks
from rap_env.envs.episode_values import EpisodeStart, Measurement, RewardedStep
from rap_env.envs.task import PruningTask
from rap_env.ladder.items import Counts
from rap_env.ladder.observation import BYTES_OVER, Observation, request_features
from rap_env.ladder.state import StackedCosts

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
        starts: Request and bytes of each sub-environment that has started an episode, by index.
        positions: The positions of the levels of each plan, (n, items).
        peak_bytes: Peak bytes of each request now, (n,).
        measured: What the model measured of each plan, with the fields of `Measurement` as columns;
            NaN where there is no value, (n, 4).
        requests: Batch sizes, lengths and budgets, and the budgets before they were clipped, 0
            where they were not, (n,) each.
        invalid_actions: Number of invalid actions, (n,).
        steps: Steps of each episode, (n,).
        over: Whether the episode has terminated or was truncated, (n,).
    """

    def __init__(self, num_envs: int, task: PruningTask) -> None:
        self._task, self._encoder = task, task.encoder
        self._rows, self._items = np.arange(num_envs), np.arange(len(task.ladder))
        self._partners = np.array(task.ladder.partners)
        self._costs = StackedCosts(task.ladder, num_envs)
        self.starts: dict[int, EpisodeStart] = {}
        self.positions = np.zeros((num_envs, len(task.ladder)), dtype=np.int64)
        self.peak_bytes, self.invalid_actions, self.steps = np.zeros((3, num_envs), dtype=np.int64)
        self.measured = np.full((num_envs, len(Measurement._fields)), np.nan)
        self.over = np.zeros(num_envs, dtype=bool)
        names = ("batch_size", "seq_len_tokens", "budget_bytes", "asked_budget_bytes")
        self.requests = {name: np.zeros(num_envs, dtype=np.int64) for name in names}
        self._names: list[list[str]] = [[] for _ in range(num_envs)]
        self._observation = task.new_arrays(num_envs)
        width = task.ladder.width, len(self._encoder.features)
        self._levels = np.zeros((num_envs, len(task.ladder), *width), dtype=np.float32)

    def start(
        self,
        starts: Mapping[int, EpisodeStart],
        measurement: Measurement | None,
        positions: Sequence[int] | None = None,
    ) -> None:
        """Start the episodes of some sub-environments, or restore them.

        Args:
            starts: Request and bytes of each one, by index.
            measurement: What the model measured of the plan, or None.
            positions: The positions of its levels; None for the unchanged model.
        """
        if not starts:
            return
        rows, costs = np.array(list(starts)), [start.costs for start in starts.values()]
        self.starts.update(starts)
        self.measured[rows] = np.nan if measurement is None else np.array(measurement, np.float64)
        self.invalid_actions[rows] = self.steps[rows] = 0
        self.over[rows] = False
        values = [
            (*vars(start.request).values(), start.asked_budget_bytes or 0)
            for start in starts.values()
        ]
        for array, column in zip(self.requests.values(), np.array(values).T, strict=True):
            array[rows] = column
        self._costs.put(rows, costs)
        self.positions[rows] = 0 if positions is None else positions
        self.peak_bytes[rows] = self._costs.dense_peak_bytes[rows]
        if positions is not None:
            self.peak_bytes[rows] = self._costs.peaks(self.positions[rows], rows)
        names, encoder = self._task.names_of(positions or [0] * len(self._items)), self._encoder
        seen, valid = self._observation[encoder.key], self._observation["action_mask"]
        for row, start in starts.items():
            request, steps = start.request, start.costs.steps
            self._levels[row] = encoder.rows_of(steps)
            self._names[row] = names.copy()
            seen[row] = encoder.native_rows(request.batch_size, request.seq_len_tokens)
            valid[row] = steps.native_valid
        self._observation["request"][rows] = request_features(
            self._task.memory,
            **{name: self.requests[name][rows] for name in vars(starts[int(rows[0])].request)},
            dense_peak_bytes=self._costs.dense_peak_bytes[rows],
            kv_cache_bytes=self._costs.kv_cache_bytes[rows],
        )
        if positions is None:
            self._show_bytes_over()
        else:
            self._show(rows.repeat(len(self._items)), np.tile(self._items, len(rows)))

    def plan(self, actions: Counts, active: Flags) -> VectorStep:
        """The effect of `actions` where `active`; 0 elsewhere, both (n,)."""
        possible = self._observation["action_mask"][self._rows, actions] > 0
        valid, invalid = active & possible, active & ~possible
        after = self._costs.lowered(self.positions, actions, self._rows)
        if not active.all():
            after[~active] = self.positions[~active]
        peaks = self._costs.peaks(after, self._rows)
        terminated = active & (peaks <= self.requests["budget_bytes"])
        goes_on, limit = active & ~terminated, self._task.max_steps
        out_of_steps = goes_on & (False if limit is None else self.steps + 1 >= limit)
        too_many = self.invalid_actions + invalid >= self._task.max_invalid_actions
        truncated = out_of_steps | (goes_on & too_many)
        return VectorStep(after, peaks, valid, invalid, terminated, truncated, out_of_steps)

    def rewarded(self, step: VectorStep) -> dict[int, RewardedStep]:
        """The steps of the sub-environments that are rewarded, by index."""
        task, ends = self._task, step.terminated | step.truncated
        acts = step.valid | step.invalid
        rows = np.flatnonzero(acts if task.reward.pays_every_step else ends).tolist()
        return {
            row: RewardedStep(
                self.starts[row],
                task.ladder.lowest
                if step.out_of_steps[row]
                else task.ladder.plan(step.positions[row].tolist()),
                self.delta_nll(row),
                bool(ends[row]),
                bool(step.truncated[row]),
            )
            for row in rows
        }

    def apply(self, step: VectorStep, measurements: Mapping[int, Measurement]) -> None:
        """Apply a step with the measurements of some plans, by index."""
        self.measured[step.valid] = np.nan
        for row, measurement in measurements.items():
            if not step.out_of_steps[row]:
                self.measured[row] = np.array(measurement, dtype=np.float64)  # None becomes NaN
        self.invalid_actions += step.invalid
        self.steps += step.valid | step.invalid
        rows, items = np.nonzero(step.positions != self.positions)
        self.positions, self.peak_bytes = step.positions, step.peak_bytes
        moved = zip(
            rows.tolist(), items.tolist(), self.positions[rows, items].tolist(), strict=True
        )
        for row, item, position in moved:
            self._task.update_names(self._names[row], item, position)
        if self._task.ladder.caches:  # what the removal of a block frees depends on its cache
            rows, items = rows.repeat(2), np.stack([items, self._partners[items]], axis=1).ravel()
        self._show(rows, items)

    def _show(self, rows: Counts, items: Counts) -> None:
        """Show the levels of some items, (k,), of some sub-environments, (k,)."""
        positions, costs = self.positions[rows, items], self._costs
        partner_positions = self.positions[rows, self._partners[items]]
        offsets = rows * costs.size
        freed = costs.freed_of(items, positions, partner_positions, offsets)
        self._observation[self._encoder.key][rows, items] = self._encoder.encode(
            self._levels[rows, items, positions], freed, costs.dense_peak_bytes[rows]
        )
        has_next = costs.next_of(items, positions, offsets) >= 0
        self._observation["action_mask"][rows, items] = has_next
        self._show_bytes_over()

    def _show_bytes_over(self) -> None:
        costs = self._costs
        over_bytes = np.maximum(0, self.peak_bytes - self.requests["budget_bytes"])
        dense_peak_bytes = np.maximum(1, costs.dense_peak_bytes)  # 0 before the first episode
        shares = np.minimum(1.0, over_bytes / dense_peak_bytes)
        self._observation["request"][:, BYTES_OVER] = shares

    def delta_nll(self, row: int) -> float | None:
        """ΔNLL of a plan in nats per token, or None if it was not measured."""
        nll, delta_nll, *_ = self.measured[row].tolist()
        return None if math.isnan(nll) else delta_nll

    def observation(self) -> Observation:
        """The current observations, in new arrays with n rows; see `usable_masks`."""
        observation = {key: array.copy() for key, array in self._observation.items()}
        if self.over.any():
            usable_masks(observation["action_mask"])
        return observation

    def saved(self, row: int) -> dict[str, Any]:
        """What `Episode.saved` returns of a single environment."""
        start = self.starts[row]
        return {
            "request": asdict(start.request),
            "asked_budget_bytes": start.asked_budget_bytes,
            "positions": self.positions[row].tolist(),
            "measured": self.delta_nll(row) is not None,
            "invalid_actions": int(self.invalid_actions[row]),
            "steps": int(self.steps[row]),
            "over": bool(self.over[row]),
        }

    def measurement(self, row: int) -> Measurement | None:
        """What the model measured of a plan, or None."""
        nll, delta_nll, predicted, baseline = self.measured[row].tolist()
        if math.isnan(nll):
            return None
        known = None if math.isnan(baseline) else baseline
        return Measurement(nll, delta_nll, bool(predicted), known)

    def restore(self, row: int, saved: Mapping[str, Any], measurement: Measurement | None) -> None:
        """Restore what `saved` returned, with a measurement of its plan."""
        start, positions = self._task.start_of_saved(saved), saved["positions"]
        self.start({row: start}, measurement, positions)
        self.invalid_actions[row], self.steps[row] = saved["invalid_actions"], saved["steps"]
        self.over[row] = saved["over"]

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
            levels = _objects(shown, self._names)
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
