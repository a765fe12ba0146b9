"""The episodes of many environments as arrays: what `Episode` is for one, and their infos.

Gymnasium's form of infos: an entry ``key`` holds a value for each sub-environment, and
``_key`` says which sub-environments have it. Where one has none, numbers are 0 and objects
None, as gymnasium's own vector environments fill them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from rap_env.envs.episode import Episode, usable_masks
from rap_env.envs.task import EpisodeStart, Flags, Floats, Measurement, PruningTask
from rap_env.errors import RapError
from rap_env.ladder.features import BYTES_OVER, bytes_over
from rap_env.ladder.items import Counts
from rap_env.ladder.observation import Observation
from rap_env.ladder.state import ShapeRow, StackedCosts
from rap_env.request import Request

_COSTS_ROWS = len(ShapeRow)
"""The first rows of `_Requests.numbers` are those of its costs; its other arrays follow."""


class _Row(IntEnum):
    """The rows of `_Requests.numbers` that follow."""

    BUDGET = _COSTS_ROWS
    ASKED = _COSTS_ROWS + 1
    PEAK_BYTES = _COSTS_ROWS + 2
    OWN_BYTES = _COSTS_ROWS + 3
    CODES = _COSTS_ROWS + 4
    INVALID_ACTIONS = _COSTS_ROWS + 5
    STEPS = _COSTS_ROWS + 6


_REQUEST = {
    "batch_size": ShapeRow.BATCH_SIZE,
    "seq_len_tokens": ShapeRow.SEQ_LEN_TOKENS,
    "budget_bytes": _Row.BUDGET,
}
"""The rows that infos show as the request."""

Generators = Sequence[np.random.Generator]


class VectorEpisodes:
    """The episodes of n sub-environments.

    The next request of each is drawn ahead, for many at once. The state of its generator
    before that is kept, and restored by `rewind` when someone asks for the generator.

    Attributes:
        started: Whether a sub-environment has started an episode, (n,).
        positions: The positions of the levels of each plan, (n, items), int8.
        measured: What the model measured of each plan, with the fields of `Measurement` as
            rows; 0 where it is not known, and NaN for a baseline that is not, (4, n).
        known: Whether the plan was measured, (n,).
        over: Whether the episode has terminated or was truncated, (n,).
    """

    def __init__(self, num_envs: int, task: PruningTask) -> None:
        self._task, self._rows = task, np.arange(num_envs)
        self._now, self._next = _Requests(num_envs, task), _Requests(num_envs, task)
        self._drawn: dict[int, tuple[np.random.Generator, dict[str, Any]]] = {}
        self.positions = np.zeros((num_envs, len(task.ladder)), dtype=np.int8)
        self.measured = np.zeros((len(Measurement._fields), num_envs))
        self.started, self.known, self.over = np.zeros((3, num_envs), dtype=bool)

    def begin(self, rows: Counts, generators: Generators, request: Any = None) -> None:
        """Start episodes in some sub-environments, (m,); if one cannot start, none does.

        Args:
            rows: Their numbers.
            generators: The generators of all sub-environments.
            request: That of all these episodes, as users pass it; None draws them.
        """
        task, starts = self._task, self._next
        if request is not None:
            starts = _Requests(len(self._rows), task)
            starts.put(rows, *task.start_many([generators[row] for row in rows], request))
        elif any(row not in self._drawn for row in rows.tolist()):
            try:
                self._draw(self._rows, generators)
            except RapError:  # perhaps of one whose turn has not come
                self.rewind()
                self._draw(rows, generators)
        self._now.copy(rows, starts)
        self.positions[rows] = 0
        self.started[rows] = self.known[rows] = True
        self.over[rows] = False
        self.measured[:, rows] = task.measured_start.values[:, None]
        if request is None:
            for row in rows.tolist():
                del self._drawn[row]

    def _draw(self, rows: Counts, generators: Generators) -> None:
        """Draw the next requests of some sub-environments, unless they were drawn."""
        missing = [row for row in rows.tolist() if row not in self._drawn]
        of_rows = [generators[row] for row in missing]
        states = [generator.bit_generator.state for generator in of_rows]
        self._drawn |= dict(zip(missing, zip(of_rows, states, strict=True), strict=True))
        self._next.put(np.array(missing), *self._task.start_many(of_rows))

    def rewind(self) -> None:
        """Restore the states that the generators have without requests that are drawn ahead."""
        for generator, state in self._drawn.values():
            generator.bit_generator.state = state
        self._drawn.clear()

    def resume(self, row: int, episode: Episode | None) -> None:
        """Continue an episode in a sub-environment; None changes nothing."""
        if episode is None:
            return
        start, rows, now = episode.start, np.array([row]), self._now
        budget, asked = start.request.budget_bytes, start.asked_budget_bytes or 0
        now.put(rows, start.costs.stacked, np.array([budget]), np.array([asked]))
        self.positions[row] = episode.state.positions
        now.show_plans(rows, self.positions[rows])
        self.started[row], self.known[row] = True, episode.measurement is not None
        self.measured[:, row] = 0.0
        if episode.measurement is not None:
            self.measured[:, row] = episode.measurement.values
        now.invalid_actions[row], now.steps[row] = episode.invalid_actions, episode.steps
        self.over[row] = episode.over

    def start_of(self, row: int) -> EpisodeStart:
        """The start of the episode of a sub-environment."""
        now = self._now
        shape = int(now.costs.batch_sizes[row]), int(now.costs.seq_lens_tokens[row])
        request = Request(*shape, int(now.budgets[row]))
        return EpisodeStart(request, self._task.costs(request), int(now.asked[row]) or None)

    def episode(self, row: int) -> Episode:
        """The episode of a sub-environment, for a single environment to continue."""
        now, measurement = self._now, None
        episode = Episode(self._task, self.start_of(row), self.positions[row].tolist())
        if self.known[row]:
            measurement = Measurement.of(self.measured[:, row])
        counters = int(now.invalid_actions[row]), int(now.steps[row]), bool(self.over[row])
        episode.resume(measurement, *counters)
        return episode

    def step(self, actions: Counts, active: Flags) -> tuple[dict[str, Floats], Flags, Flags]:
        """Take `actions` where `active`, both (n,). If the model fails, nothing changes.

        Returns:
            The reward's terms by name, and whether episodes terminate or are truncated, (n,)
            each.
        """
        task, now = self._task, self._now
        known = active & (actions < self.positions.shape[1])
        actions = np.where(known, actions, 0)
        plans, items, lower = now.costs.moves(self.positions, actions, self._rows)
        if not known.all():
            acts = known[plans]
            plans, items, lower = plans[acts], items[acts], lower[acts]
        before = self.positions[plans, items]
        own_bytes, codes = now.after(plans, items, before, lower)
        peaks = now.costs.with_shared(own_bytes, codes, slice(None))
        invalid = active.copy()
        invalid[plans] = False
        over_budget = active & (peaks > now.budgets)
        invalid_actions, steps = now.invalid_actions + invalid, now.steps + active
        truncated, out_of_steps = task.truncates(over_budget, invalid_actions, steps)
        terminated = active & ~over_budget
        ends = terminated | truncated
        terms = {name: np.zeros(len(active)) for name in task.reward.zeros()}
        (rows,) = (active if task.reward.pays_every_step else ends).nonzero()
        self.positions[plans, items] = lower
        if len(rows):
            reached, late = self.positions[rows].astype(np.int64), out_of_steps[rows]
            reached[late] = task.lowest_positions
            try:
                measured, paid = task.compute_rewards(
                    reached,
                    self.measured[1, rows],
                    ends[rows],
                    truncated[rows],
                    lambda number: self.start_of(int(rows[number])),
                )
            except BaseException:
                self.positions[plans, items] = before
                raise
            for name, values in paid.items():
                terms[name][rows] = values
            rows, measured = rows[~late], measured[:, ~late]
        terms["invalid_action"] = np.where(invalid, -task.invalid_action_penalty, 0.0)
        self.known[plans], self.measured[:, plans] = False, 0.0
        if len(rows):
            self.known[rows], self.measured[:, rows] = True, measured
        now.own_bytes[:], now.codes[:], now.peak_bytes[:] = own_bytes, codes, peaks
        now.invalid_actions[:], now.steps[:] = invalid_actions, steps
        self.over = ends | ~active
        now.show(self.positions, plans, items)
        return terms, terminated, truncated

    def observation(self) -> Observation:
        """The current observations, in new arrays with n rows; see `usable_masks`."""
        observation = {key: array.copy() for key, array in self._now.seen.items()}
        if self.over.any():
            usable_masks(observation["action_mask"])
        return observation

    def action_masks(self) -> Flags:
        """The action masks of the observations, (n, actions)."""
        masks = self._now.seen["action_mask"].copy()
        usable_masks(masks)
        return masks > 0

    def infos(self, shown: Flags, terms: Mapping[str, Floats], rewarded: Flags) -> dict[str, Any]:
        """The infos that the sub-environments `shown` would return as single environments.

        Args:
            shown: Sub-environments to include, (n,). It becomes part of the infos.
            terms: The reward's terms by name, (n,) each.
            rewarded: Sub-environments that have such terms, (n,). Part of the infos, too.
        """
        task, seen = self._task, self._now.numbers.copy()
        measured, known = self.measured.copy(), shown & self.known
        if not shown.all():
            seen *= shown
            measured *= shown
        if not rewarded.all():
            terms = {name: np.where(rewarded, values, 0.0) for name, values in terms.items()}
        if task.info_arrays:
            levels = self.positions * shown[:, None]
        else:
            levels = np.empty(len(shown), dtype=object)
            each = task.shown_names(self.positions[shown])
            for row, names in zip(shown.nonzero()[0].tolist(), each, strict=True):
                levels[row] = names
        request = {name: seen[number] for name, number in _REQUEST.items()}
        infos: dict[str, Any] = {}
        _add(infos, task.info_key, levels, shown)
        _add(infos, "peak_bytes", seen[_Row.PEAK_BYTES], shown)
        _add(infos, "request", _entries(request, shown), shown)
        paid = _entries(terms, rewarded) if rewarded.any() else {}
        _add(infos, "reward_terms", paid, shown)
        if known.any():
            nll, delta_nll, predicted, baseline = measured
            _add(infos, "nll", nll, known)
            _add(infos, task.delta_key, delta_nll, known)
            compared = known & (baseline == baseline)
            if task.reward.relative_to is not None and compared.any():
                baseline[~compared] = 0.0
                _add(infos, f"baseline_{task.delta_key}", baseline, compared)
            flagged = predicted > 0
            if flagged.any():
                _add(infos, "predicted", flagged, flagged.copy())
        clipped = seen[_Row.ASKED] > 0
        if clipped.any():
            asked = {"asked_budget_bytes": seen[_Row.ASKED]}
            _add(infos, "infeasible", _entries(asked, clipped), clipped)
        return infos

    def final_infos(self, done: Flags, terms: Mapping[str, Floats]) -> dict[str, Any]:
        """The last observations and infos of episodes that end in a step with autoreset."""
        (rows,) = done.nonzero()
        seen = {key: array[rows] for key, array in self._now.seen.items()}
        usable_masks(seen["action_mask"])
        observations = np.empty(len(done), dtype=object)
        for number, row in enumerate(rows.tolist()):
            observations[row] = {key: array[number] for key, array in seen.items()}
        infos: dict[str, Any] = {}
        _add(infos, "final_obs", observations, done)
        _add(infos, "final_info", self.infos(done, terms, done), done.copy())
        return infos


class _Requests:
    """The requests of n sub-environments with their plans, as numbers and as observations.

    Attributes:
        numbers: A row for each `ShapeRow` of `costs` and for each `_Row`, (rows, n).
        costs: The bytes of the requests.
        budgets: Their budgets, (n,).
        asked: The budgets before they were raised to the least possible ones, 0 where they were
            not, (n,).
        own_bytes: Peak bytes of the plans without what items share, (n,).
        codes: What their items count for, see `Ladder.sharer_codes`, (n,).
        peak_bytes: Peak bytes, (n,).
        invalid_actions: Number of invalid actions, (n,).
        steps: Steps of each episode, (n,).
        seen: The observations.
    """

    def __init__(self, num_envs: int, task: PruningTask) -> None:
        encoder = self._encoder = task.encoder
        numbers = self.numbers = np.zeros((_COSTS_ROWS + len(_Row), num_envs), dtype=np.int64)
        self.costs = StackedCosts(encoder.ladder_bytes.tables, numbers[:_COSTS_ROWS])
        # So that no share of a native peak is infinite before the first start.
        self.costs.native_peak_bytes[:] = 1
        self.budgets, self.asked = numbers[_Row.BUDGET], numbers[_Row.ASKED]
        self.peak_bytes, self.own_bytes = numbers[_Row.PEAK_BYTES], numbers[_Row.OWN_BYTES]
        self.codes, self.steps = numbers[_Row.CODES], numbers[_Row.STEPS]
        self.invalid_actions = numbers[_Row.INVALID_ACTIONS]
        self.seen: Observation = {
            key: np.zeros((num_envs, *zeros.shape), zeros.dtype)
            for key, zeros in encoder.zeros.items()
        }
        self._seen_rows = self.seen[encoder.key].reshape(-1).view(encoder.row_type)
        self._valid = self.seen["action_mask"].reshape(-1)

    def put(self, rows: Counts, costs: StackedCosts, budgets: Counts, asked: Counts) -> None:
        """Set what `PruningTask.start_many` returns for some rows, (m,), with native plans."""
        encoder = self._encoder
        self.costs.put(rows, costs)
        self.budgets[rows], self.asked[rows] = budgets, asked
        self.invalid_actions[rows] = self.steps[rows] = 0
        self.seen["request"][rows] = encoder.request(costs, budgets)
        self.show_plans(rows, np.zeros((len(rows), len(encoder.ladder)), dtype=np.int8))

    def copy(self, rows: Counts, others: _Requests) -> None:
        """Set some rows, (m,), to those of others."""
        self.costs.put(rows, others.costs, rows)
        self.numbers[_COSTS_ROWS:, rows] = others.numbers[_COSTS_ROWS:, rows]
        for key, array in self.seen.items():
            array[rows] = others.seen[key][rows]

    def show_plans(self, rows: Counts, positions: Counts) -> None:
        """Set the plans of some rows, (m, items)."""
        costs, seen = self.costs, self.seen
        own_bytes, codes = costs.sums(positions, rows)
        self.own_bytes[rows], self.codes[rows] = own_bytes, codes
        self.peak_bytes[rows] = costs.with_shared(own_bytes, codes, rows)
        seen[self._encoder.key][rows], seen["action_mask"][rows] = self._encoder.encode_plans(
            costs, positions, rows
        )
        self._show_bytes_over()

    def after(
        self, plans: Counts, items: Counts, before: npt.NDArray[Any], after: Counts
    ) -> tuple[Counts, Counts]:
        """`own_bytes` and `codes` after items of plans moved to other positions, (moves,) each."""
        costs, codes, count = self.costs, self._encoder.ladder.sharer_codes, len(self.budgets)
        levels, lower_levels = costs.levels(items, before), costs.levels(items, after)
        freed = costs.item_bytes(levels, plans) - costs.item_bytes(lower_levels, plans)
        changes = codes.take(lower_levels) - codes.take(levels)
        return (
            self.own_bytes - _sums(plans, freed, count),
            self.codes + _sums(plans, changes, count),
        )

    def show(self, positions: npt.NDArray[Any], plans: Counts, items: Counts) -> None:
        """Show items of plans that have moved, and what lowering their counterparts frees.

        Args:
            positions: The positions of all plans' levels, (n, items).
            plans: The numbers of the plans, (moves,).
            items: The items, (moves,).
        """
        encoder = self._encoder
        others = encoder.ladder.counterpart_array[items]
        if encoder.ladder.caches:
            pairs = (plans, plans), (items, others), (others, items)
            plans, items, others = map(np.concatenate, pairs)
        shown = positions[plans, items], positions[plans, others]
        rows, valid = encoder.encode(self.costs, items, *shown, plans)
        cells = plans * positions.shape[1] + items
        self._seen_rows[cells], self._valid[cells] = rows, valid
        if encoder.ladder.together:
            (moved,) = np.bincount(plans[encoder.ladder.is_cache[items]]).nonzero()
            seen = self.seen[encoder.key]
            encoder.show_together(seen, self.costs, positions[moved], moved, at=moved)
        self._show_bytes_over()

    def _show_bytes_over(self) -> None:
        over = bytes_over(self.peak_bytes, self.budgets, self.costs.native_peak_bytes)
        self.seen["request"][:, BYTES_OVER] = over


def _add(infos: dict[str, Any], key: str, value: Any, has_it: Flags) -> None:
    """Add a value for each sub-environment, and the flags that say which ones have it."""
    infos[key], infos[f"_{key}"] = value, has_it


def _entries(values: Mapping[str, npt.NDArray[Any]], has_it: Flags) -> dict[str, Any]:
    infos: dict[str, Any] = {}
    for key, value in values.items():
        _add(infos, key, value, has_it)
    return infos


def _sums(groups: Counts, values: Counts, count: int) -> Counts:
    """The sums of whole numbers below 2**53 by the number of their group, (count,)."""
    return np.bincount(groups, values, count).astype(np.int64)
