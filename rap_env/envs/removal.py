"""What an action of `RAPPrune-v0` does: it removes a block."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rap_env.blocks import BlockMask, block_name
from rap_env.costs import Counts, Flags, RequestCosts, VectorByteTracker, request_costs
from rap_env.envs.config import EnvConfig
from rap_env.envs.episode import EpisodeStart
from rap_env.envs.task import PruningTask
from rap_env.errors import InvalidRequestError
from rap_env.observation import KEPT_AND_FREED, Observation, ObservationBuilder
from rap_env.plan import MaskOrPlan
from rap_env.request import Request

if TYPE_CHECKING:
    from rap_env.context.base import PruningContext

BaselineMask = Callable[[EpisodeStart[RequestCosts]], BlockMask]
"""Returns the mask that a baseline has for the request of an episode."""


class RemovalTask(PruningTask[RequestCosts]):
    """The parts that environments of v0 share; an action is the index of a block."""

    unchanged = "dense"

    def _prepare(self, config: EnvConfig) -> None:
        self.num_actions = self.memory.facts.num_blocks
        self.observations = ObservationBuilder(self.memory, self.context.features)

    def costs(self, request: Request) -> RequestCosts:
        """What each removal frees."""
        return request_costs(self.memory, request.batch_size, request.seq_len_tokens)

    def new_state(self, start: EpisodeStart[RequestCosts]) -> RemovalState:
        """The dense model."""
        return RemovalState(start, self.observations.build(start.request, BlockMask()))

    def new_vector_state(self, num_envs: int) -> VectorRemovalState:
        """The removed blocks of many sub-environments."""
        return VectorRemovalState(num_envs, self.num_actions)

    @property
    def lowest(self) -> BlockMask:
        """The mask of all blocks."""
        return BlockMask(frozenset(range(self.num_actions)))

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


def from_frontier(context: PruningContext) -> Callable[[EpisodeStart[Any]], BlockMask]:
    """The best known mask for each request.

    Raises:
        ArtifactError: There is no frontier.
    """
    frontier = context.frontier

    def best(start: EpisodeStart[Any]) -> BlockMask:
        found = frontier.best(context.memory, start.request)
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


class RemovedBlocks:
    """Indices and names of the blocks that an episode has removed, in ascending order."""

    __slots__ = ("indices", "names")

    def __init__(self, indices: Iterable[int] = ()) -> None:
        self.indices = sorted(indices)
        self.names = [block_name(index) for index in self.indices]

    def add(self, index: int) -> None:
        """Add a block."""
        position = bisect(self.indices, index)
        self.indices.insert(position, index)
        self.names.insert(position, block_name(index))

    def mask(self, *more: int) -> BlockMask:
        """The mask that removes these blocks and `more`."""
        return BlockMask(frozenset((*self.indices, *more)))


class RemovalState:
    """The blocks that an episode has removed; an `EpisodeState`."""

    def __init__(self, start: EpisodeStart[RequestCosts], observation: Observation) -> None:
        self.observation = observation
        self._removed = RemovedBlocks()
        self._bytes = start.costs.tracker()

    @property
    def peak_bytes(self) -> int:
        """Peak bytes now."""
        return self._bytes.peak_bytes

    def is_valid(self, action: int) -> bool:
        """Whether the block is kept."""
        return action not in self._removed.indices

    def peak_after(self, action: int) -> int:
        """Peak bytes without the kept block."""
        return self._bytes.peak_without(action)

    def plan_after(self, action: int | None = None) -> BlockMask:
        """The mask that also removes a block."""
        return self._removed.mask() if action is None else self._removed.mask(action)

    def apply(self, action: int) -> None:
        """Remove a kept block."""
        self._removed.add(action)
        self._bytes.remove(action)
        self.observation["blocks"][action, KEPT_AND_FREED] = 0.0
        self.observation["action_mask"][action] = 0

    def info(self, *, arrays: bool) -> dict[str, Any]:
        """The names of the removed blocks, or 1 for each removed block."""
        names = self._removed.names
        return {"removed": 1 - self.observation["action_mask"] if arrays else names.copy()}


class VectorRemovalState:
    """The blocks that n episodes have removed; a `VectorState`."""

    info_key = "removed"

    def __init__(self, num_envs: int, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._removed = [RemovedBlocks() for _ in range(num_envs)]
        self._bytes = VectorByteTracker(num_envs, num_blocks)

    @property
    def dense_peak_bytes(self) -> Counts:
        """Peak bytes of each request with the dense model, (n,)."""
        return self._bytes.dense_peak_bytes

    @property
    def peak_bytes(self) -> Counts:
        """Peak bytes of each request now, (n,)."""
        return self._bytes.peak_bytes

    def start(self, row: int, costs: RequestCosts, plan: MaskOrPlan) -> None:
        """Start sub-environment `row` with a mask."""
        assert isinstance(plan, BlockMask)
        self._removed[row] = RemovedBlocks(plan.indices)
        self._bytes.start(row, costs, plan.indices)

    def peak_after(self, actions: Counts, valid: Flags) -> Counts:
        """Peak bytes of each request, (n,), if the valid actions are taken."""
        return self._bytes.peak_without(actions, valid)

    def apply(
        self, actions: Counts, valid: Flags, peak_bytes: Counts, observation: Observation
    ) -> None:
        """Take the valid actions, after which the requests need `peak_bytes`; all (n,)."""
        where = np.flatnonzero(valid)
        blocks = actions[where]
        for row, block in zip(where.tolist(), blocks.tolist(), strict=True):
            self._removed[row].add(block)
        self._bytes.remove(actions, valid, peak_bytes)
        observation["blocks"][where, blocks, KEPT_AND_FREED] = 0.0
        observation["action_mask"][where, blocks] = 0

    def plan_after(self, row: int, action: int | None = None) -> BlockMask:
        """The mask of a sub-environment that also removes a block."""
        removed = self._removed[row]
        return removed.mask() if action is None else removed.mask(action)

    def info(self, row: int) -> list[str]:
        """The names of the blocks that a sub-environment has removed."""
        return self._removed[row].names.copy()

    def info_array(self) -> npt.NDArray[np.int8]:
        """1 for each block that a sub-environment has removed, (n, blocks)."""
        flags = np.zeros((len(self._removed), self._num_blocks), dtype=np.int8)
        for row, removed in enumerate(self._removed):
            flags[row, removed.indices] = 1
        return flags

    def saved_plan(self, state: Mapping[str, Any]) -> BlockMask:
        """The mask of a saved state."""
        return BlockMask.of(*state[self.info_key])
