"""What an action of `RAPPrune-v1` does: it lowers an item by one level."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from rap_env.context.base import item_importance, item_order
from rap_env.costs import Counts, Flags, freed_share
from rap_env.envs.config import EnvConfig, LadderEnvConfig
from rap_env.envs.episode import EpisodeStart
from rap_env.envs.removal import from_frontier, no_gsi_order, nothing_known
from rap_env.envs.task import PruningTask
from rap_env.ladder.item_bytes import LadderBytes
from rap_env.ladder.item_observation import (
    FREED,
    ItemObservationBuilder,
    ItemObservationTracker,
)
from rap_env.ladder.items import Ladder
from rap_env.ladder.state import LadderCosts
from rap_env.ladder.vector_tracker import VectorLevelTracker
from rap_env.observation import Observation
from rap_env.plan import Plan
from rap_env.request import Request


class LoweringTask(PruningTask[LadderCosts]):
    """The parts that environments of v1 share; an action is the number of an item.

    Attributes:
        ladder: The items.
        item_bytes: The model's byte arithmetic over them.
    """

    unchanged = "native"

    def _prepare(self, config: EnvConfig) -> None:
        assert isinstance(config, LadderEnvConfig)
        self.ladder = Ladder.of(self.memory.facts, config.levels, config.together)
        self.item_bytes = LadderBytes(self.memory, self.ladder)
        self.num_actions = len(self.ladder)
        importance = item_importance(self.context, self.item_bytes)
        self.observations = self.builder = ItemObservationBuilder(self.item_bytes, importance)

    def costs(self, request: Request) -> LadderCosts:
        """The bytes of each item at each level."""
        return self.item_bytes.costs(request.batch_size, request.seq_len_tokens)

    def new_state(self, start: EpisodeStart[LadderCosts]) -> LoweringState:
        """The native model."""
        return LoweringState(start, self.builder)

    def new_vector_state(self, num_envs: int) -> VectorLoweringState:
        """The levels of many sub-environments."""
        return VectorLoweringState(num_envs, self.builder)

    @property
    def lowest(self) -> Plan:
        """The plan with every item at its lowest level."""
        return self.ladder.lowest

    def action_name(self, action: int) -> str:
        """The name of the item that an action lowers."""
        return self.ladder.items[action].name

    def is_pointless(self, start: EpisodeStart[LadderCosts]) -> bool:
        """Whether the native model fits, or the lowest levels need no fewer bytes than it."""
        return start.fits or start.costs.least_peak_bytes >= start.costs.dense_peak_bytes

    def check_feasible(self, start: EpisodeStart[LadderCosts]) -> None:
        """Raise an `InfeasibleBudgetError`: the lowest levels need more than the budget."""
        self.item_bytes.check_feasible(start.request)

    def baseline(self, name: str) -> Callable[[EpisodeStart[LadderCosts]], Plan]:
        """An order followed until the request fits, or the best plan or mask of the frontier."""
        if name == "frontier":
            return self._from_frontier()
        if name == "gsi" and self.context.importance == "none":
            raise no_gsi_order()
        steps = item_order(self.context, self.item_bytes, name).steps
        return lambda start: start.costs.lower_until_fits(steps, start.request.budget_bytes)

    def _from_frontier(self) -> Callable[[EpisodeStart[LadderCosts]], Plan]:
        """The best known plan for each request; the best mask if the table has masks only."""
        table = self.context.frontier
        if table.has_masks_only:
            return from_frontier(self.context)
        known = table.on(self.ladder)

        def best(start: EpisodeStart[LadderCosts]) -> Plan:
            found = known.best(start.costs, start.request.budget_bytes)
            if found is None:
                raise nothing_known("plan", start.request)
            return found

        return best

    def _pointless(self, start: EpisodeStart[LadderCosts]) -> str:
        if start.fits:
            return super()._pointless(start).replace("to remove", "to lower")
        return (
            f"The lowest levels need no fewer bytes than the native model for {start.request}, so "
            "there is nothing to lower; give a longer sequence, or name other levels."
        )

    def _nothing_drawn(self, start: EpisodeStart[LadderCosts]) -> str:
        if start.fits:
            return super()._nothing_drawn(start)
        return (
            f"None of the requests drawn from the workload can be helped. {self._pointless(start)}"
        )


class LoweringState:
    """The levels of the items in an episode; an `EpisodeState`."""

    def __init__(self, start: EpisodeStart[LadderCosts], builder: ItemObservationBuilder) -> None:
        self._ladder = builder.ladder
        self._seen = ItemObservationTracker(builder, start.request)
        self._levels = self._seen.levels
        self.observation = self._seen.observation
        self._names = ["native"] * len(builder.ladder)

    @property
    def peak_bytes(self) -> int:
        """Peak bytes now."""
        return self._levels.peak_bytes

    def is_valid(self, action: int) -> bool:
        """Whether the item has a lower level."""
        return self._levels.is_valid(action)

    def peak_after(self, action: int) -> int:
        """Peak bytes with the item at its next level."""
        return self._levels.lowering(action).peak_bytes

    def plan_after(self, action: int | None = None) -> Plan:
        """The plan after an item was lowered, if it can be."""
        levels = self._levels
        if action is None or not levels.is_valid(action):
            return levels.plan
        return self._ladder.plan(levels.positions_after(action))

    def apply(self, action: int) -> None:
        """Lower an item that has a lower level."""
        for item in self._seen.lower(action):
            self._names[item] = self._ladder.level_names[item][self._levels.positions[item]]

    def info(self, *, arrays: bool) -> dict[str, Any]:
        """The name of each item's level, or its position in the item's levels."""
        if arrays:
            return {"levels": np.array(self._levels.positions, dtype=np.int8)}
        return {"levels": self._names.copy()}


class VectorLoweringState:
    """The levels of the items in n episodes; a `VectorState`."""

    info_key = "levels"

    def __init__(self, num_envs: int, builder: ItemObservationBuilder) -> None:
        ladder = builder.ladder
        self._builder, self._ladder = builder, ladder
        self._tracker = VectorLevelTracker(num_envs, ladder)
        self._items = np.arange(len(ladder))
        self._level_names = np.full((len(ladder), ladder.width), "", dtype=object)
        for item, names in enumerate(ladder.level_names):
            self._level_names[item, : len(names)] = names
        self._names = np.full((num_envs, len(ladder)), "native", dtype=object)
        columns = builder.space["ladder"].shape[-1]  # type: ignore[index]
        self._rows = np.zeros((num_envs, len(ladder), ladder.width, columns), dtype=np.float32)

    @property
    def dense_peak_bytes(self) -> Counts:
        """Peak bytes of each request with the native model, (n,)."""
        return self._tracker.dense_peak_bytes

    @property
    def peak_bytes(self) -> Counts:
        """Peak bytes of each request now, (n,)."""
        return self._tracker.peak_bytes

    def start(
        self, rows: Counts, costs: Sequence[LadderCosts], plan: Plan, seen: Observation
    ) -> None:
        """Start the sub-environments `rows`, (m,), all with a plan."""
        self._tracker.start(rows, costs, self._ladder.positions(plan))
        self._rows[rows] = [self._builder.rows_of(one.steps) for one in costs]
        self._show(rows.repeat(len(self._items)), np.tile(self._items, len(rows)), seen)

    def peak_after(self, actions: Counts, valid: Flags) -> Counts:
        """Peak bytes of each request, (n,), if the valid actions are taken."""
        return self._tracker.peak_after(actions, valid)

    def apply(self, actions: Counts, valid: Flags, peak_bytes: Counts, seen: Observation) -> None:
        """Take the valid actions, after which the requests need `peak_bytes`; all (n,)."""
        self._show(*self._tracker.lower(actions, valid, peak_bytes), seen)

    def _show(self, rows: Counts, items: Counts, seen: Observation) -> None:
        """Show the levels of some items, (k,), of some sub-environments, (k,)."""
        tracker = self._tracker
        positions = tracker.positions[rows, items]
        self._names[rows, items] = self._level_names[items, positions]
        shown = self._rows[rows, items, positions]
        shown[:, FREED] = freed_share(
            tracker.freed_bytes(rows, items), tracker.dense_peak_bytes[rows]
        )
        seen["ladder"][rows, items] = shown
        seen["action_mask"][rows, items] = tracker.next_level[rows, items, positions] >= 0

    def plans(self, rows: Counts, actions: Counts | None = None) -> list[Plan]:
        """The plans of the sub-environments `rows`, (m,), now or after items, (m,), were lowered.

        An item without a lower level stays as it is.
        """
        positions = self._tracker.positions[rows]
        if actions is not None:
            positions = self._tracker.lowered(rows, positions, actions)
        return [self._ladder.plan(found) for found in positions.tolist()]

    def infos(self, rows: Counts) -> list[list[str]]:
        """The level of each item of each of the sub-environments `rows`, (m,)."""
        names: list[list[str]] = self._names[rows].tolist()
        return names

    def info_array(self) -> npt.NDArray[np.int8]:
        """The position of each item's level in its levels, (n, items)."""
        return self._tracker.positions.astype(np.int8)

    def saved_plan(self, state: Mapping[str, Any]) -> Plan:
        """The plan of a saved state."""
        levels = zip(self._ladder.items, state[self.info_key], strict=True)
        return Plan.of(
            {
                item.name: level
                for item, level in levels
                if not (item.kind == "cache" and level == "removed")
            }
        )
