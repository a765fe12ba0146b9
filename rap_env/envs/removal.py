"""What an action of `RAPPrune-v0` does: it removes a block."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rap_env.blocks import block_name
from rap_env.costs import (
    Counts,
    Flags,
    RequestCosts,
    VectorByteTracker,
    freed_share,
    request_costs,
)
from rap_env.envs.config import EnvConfig
from rap_env.envs.episode import EpisodeStart
from rap_env.envs.task import PruningTask
from rap_env.errors import InvalidRequestError
from rap_env.observation import KEPT_AND_FREED, Observation, ObservationBuilder
from rap_env.plan import Plan
from rap_env.request import Request

if TYPE_CHECKING:
    from rap_env.context.base import PruningContext

BaselineMask = Callable[[EpisodeStart[RequestCosts]], Plan]
"""Returns the mask that a baseline has for the request of an episode."""


class RemovalTask(PruningTask[RequestCosts]):
    """The parts that environments of v0 share; an action is the index of a block."""

    unchanged = "dense"

    def _prepare(self, config: EnvConfig) -> None:
        self.num_actions = self.memory.facts.num_blocks
        self.observations = self.builder = ObservationBuilder(self.memory, self.context.features)

    def costs(self, request: Request) -> RequestCosts:
        """What each removal frees."""
        return request_costs(self.memory, request.batch_size, request.seq_len_tokens)

    def new_state(self, start: EpisodeStart[RequestCosts]) -> RemovalState:
        """The dense model."""
        return RemovalState(start, self.observations.build(start.request, Plan()))

    def new_vector_state(self, num_envs: int) -> VectorRemovalState:
        """The removed blocks of many sub-environments."""
        return VectorRemovalState(num_envs, self.builder)

    @property
    def lowest(self) -> Plan:
        """The mask of all blocks."""
        return Plan(frozenset(range(self.num_actions)))

    def action_name(self, action: int) -> str:
        """The name of the block that an action removes."""
        return block_name(action)

    def check_feasible(self, start: EpisodeStart[RequestCosts]) -> None:
        """Raise an `InfeasibleBudgetError`: the request needs more with every block removed."""
        self.memory.check_feasible(start.request)

    def baseline(self, name: str) -> BaselineMask:
        """An order followed until the request fits, or the best mask of the frontier."""
        context = self.context
        if name == "frontier":
            return from_frontier(context)
        if name == "one_shot":
            order = np.argsort(np.asarray(context.one_shot.delta_nll), kind="stable").tolist()
        elif context.features.gsi_rank.any():
            order = context.gsi.full_order
        else:  # zeros: importance="none"
            raise no_gsi_order()
        return lambda start: start.costs.remove_until_fits(order, start.request.budget_bytes)


def from_frontier(context: PruningContext) -> Callable[[EpisodeStart[Any]], Plan]:
    """The best known mask for each request.

    Raises:
        ArtifactError: There is no frontier.
    """
    frontier = context.frontier

    def best(start: EpisodeStart[Any]) -> Plan:
        found = frontier.best_mask(context.memory, start.request)
        if found is None:
            raise nothing_known("mask", start.request)
        return found

    return best


def nothing_known(what: str, request: Request) -> InvalidRequestError:
    """The error for a reward relative to a frontier that has nothing for a request."""
    return InvalidRequestError(
        f"No {what} of the frontier fits {request}, so a reward cannot be relative to it; build "
        "the frontier for smaller budgets too, or give the workload larger ones."
    )


def no_gsi_order() -> InvalidRequestError:
    """The error for a reward relative to an order that was not measured."""
    return InvalidRequestError(
        "A reward relative to 'gsi' needs the GSI order, but importance='none' leaves it out; "
        "use importance='gsi', or relative_to='one_shot'."
    )


class RemovalState:
    """The blocks that an episode has removed; an `EpisodeState`."""

    def __init__(self, start: EpisodeStart[RequestCosts], observation: Observation) -> None:
        self.observation = observation
        self._removed: list[int] = []  # in ascending order
        self._names: list[str] = []
        self._bytes = start.costs.tracker()

    @property
    def peak_bytes(self) -> int:
        """Peak bytes now."""
        return self._bytes.peak_bytes

    def is_valid(self, action: int) -> bool:
        """Whether the block is kept."""
        return action not in self._removed

    def peak_after(self, action: int) -> int:
        """Peak bytes without the kept block."""
        return self._bytes.peak_without(action)

    def plan_after(self, action: int | None = None) -> Plan:
        """The mask that also removes a block."""
        more = () if action is None else (action,)
        return Plan(frozenset((*self._removed, *more)))

    def apply(self, action: int) -> None:
        """Remove a kept block."""
        place = bisect(self._removed, action)
        self._removed.insert(place, action)
        self._names.insert(place, block_name(action))
        self._bytes.remove(action)
        self.observation["blocks"][action, KEPT_AND_FREED] = 0.0
        self.observation["action_mask"][action] = 0

    def info(self, *, arrays: bool) -> dict[str, Any]:
        """The names of the removed blocks, or 1 for each removed block."""
        return {"removed": 1 - self.observation["action_mask"] if arrays else self._names.copy()}


class VectorRemovalState:
    """The blocks that n episodes have removed; a `VectorState`."""

    info_key = "removed"

    def __init__(self, num_envs: int, builder: ObservationBuilder) -> None:
        count = builder.memory.facts.num_blocks
        self._builder = builder
        self._removed = np.zeros((num_envs, count), dtype=bool)
        self._names: list[list[str]] = [[] for _ in range(num_envs)]
        self._blocks = np.arange(count)
        self._bytes = VectorByteTracker(num_envs, count)

    @property
    def dense_peak_bytes(self) -> Counts:
        """Peak bytes of each request with the dense model, (n,)."""
        return self._bytes.dense_peak_bytes

    @property
    def peak_bytes(self) -> Counts:
        """Peak bytes of each request now, (n,)."""
        return self._bytes.peak_bytes

    def start(
        self, rows: Counts, costs: Sequence[RequestCosts], plan: Plan, seen: Observation
    ) -> None:
        """Start the sub-environments `rows`, (m,), all with a mask."""
        assert plan.is_mask
        removed, tracker = sorted(plan.removed), self._bytes
        tracker.start(rows, costs, removed)
        self._removed[rows] = False
        self._removed[rows[:, None], removed] = True
        for row in rows.tolist():
            self._names[row] = list(plan.removed_names)
        shares = freed_share(tracker.freed_bytes[rows], tracker.dense_peak_bytes[rows, None])
        blocks = self._builder.dense_blocks(shares)
        blocks[:, removed, KEPT_AND_FREED] = 0.0
        seen["blocks"][rows] = blocks
        seen["action_mask"][rows] = ~self._removed[rows]

    def peak_after(self, actions: Counts, valid: Flags) -> Counts:
        """Peak bytes of each request, (n,), if the valid actions are taken."""
        return self._bytes.peak_without(actions, valid)

    def apply(self, actions: Counts, valid: Flags, peak_bytes: Counts, seen: Observation) -> None:
        """Take the valid actions, after which the requests need `peak_bytes`; all (n,)."""
        rows = np.flatnonzero(valid)
        blocks = actions[rows]
        places = (self._removed[rows] & (self._blocks < blocks[:, None])).sum(axis=1)
        for row, block, place in zip(rows.tolist(), blocks.tolist(), places.tolist(), strict=True):
            self._names[row].insert(place, block_name(block))
        self._removed[rows, blocks] = True
        self._bytes.remove(actions, valid, peak_bytes)
        seen["blocks"][rows, blocks, KEPT_AND_FREED] = 0.0
        seen["action_mask"][rows, blocks] = 0

    def plans(self, rows: Counts, actions: Counts | None = None) -> list[Plan]:
        """The masks of the sub-environments `rows`, (m,), now or after removals, (m,)."""
        removed = self._removed[rows]
        if actions is not None:
            removed[np.arange(len(rows)), actions] = True
        return [Plan(frozenset(np.flatnonzero(flags).tolist())) for flags in removed]

    def infos(self, rows: Counts) -> list[list[str]]:
        """The names of the blocks that each of the sub-environments `rows`, (m,), has removed."""
        return [self._names[row].copy() for row in rows.tolist()]

    def info_array(self) -> npt.NDArray[np.int8]:
        """1 for each block that a sub-environment has removed, (n, blocks)."""
        return self._removed.astype(np.int8)

    def saved_plan(self, state: Mapping[str, Any]) -> Plan:
        """The mask of a saved state."""
        return Plan.removing(*state[self.info_key])
