"""Batches of observations of many masks or plans at once, and of the states on the way to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from rap_env.context.base import PruningContext, item_importance
from rap_env.costs import Counts, Flags, VectorByteTracker, request_costs
from rap_env.ladder.item_bytes import LadderBytes
from rap_env.ladder.item_observation import ItemObservationBuilder
from rap_env.ladder.items import Ladder
from rap_env.ladder.plan_observer import PlanObserver
from rap_env.memory import MemoryModel
from rap_env.observation import BYTES_OVER, KEPT_AND_FREED, Observation, ObservationBuilder
from rap_env.plan import Plan, only_mask
from rap_env.request import Request

Builder = ObservationBuilder | ItemObservationBuilder
"""Builds the observations of `RAPPrune-v0` or of `RAPPrune-v1`."""


State = npt.NDArray[Any]
"""An entry for each action: in v0, whether a block is removed; in v1, the position of a level."""


class Observer(Protocol):
    """Observes batches of n states, (n, actions), under some requests.

    `rap_env.ladder.plan_observer.PlanObserver` describes the methods.
    """

    def start(self, count: int, /) -> State:
        """The states of `count` unchanged models, (count, actions)."""

    def position(self, plan: Plan, /) -> State:
        """The state of a mask or plan, (actions,)."""

    def plan(self, state: State, /) -> Plan:
        """The mask or plan of a state, (actions,)."""

    def over_bytes(self, which: Counts, states: State, /) -> Counts:
        """Bytes above the budget, 0 where the request fits, (n,)."""

    def observe(self, which: Counts, states: State, /) -> Observation:
        """The observations, all float32."""

    def act(self, which: Counts, states: State, actions: Counts, /) -> State:
        """The states after actions, (n,)."""

    def right_actions(self, which: Counts, states: State, targets: State, /) -> Flags:
        """The actions that lead towards targets, (n, actions)."""

    def distance(self, which: Counts, targets: State, /) -> Counts:
        """The number of right actions from the unchanged model to targets, (n,)."""

    def walk(
        self, which: Counts, targets: State, steps: Counts, rng: np.random.Generator, /
    ) -> tuple[State, Flags]:
        """The states after random right actions, and the right actions there."""


class MaskObserver:
    """Observes batches of n masks under some requests, on a model of 2L blocks; an `Observer`.

    Args:
        builder: Builds the observation of the dense model, once for each request.
        requests: The requests; the methods refer to them by index.
    """

    def __init__(self, builder: ObservationBuilder, requests: Sequence[Request]) -> None:
        memory = builder.memory
        dense = [builder.dense(request) for request in requests]
        self._request = np.stack([seen["request"] for seen in dense])
        self._blocks = np.stack([seen["blocks"] for seen in dense])
        self._bytes = VectorByteTracker(len(requests), memory.facts.num_blocks)
        costs = [request_costs(memory, one.batch_size, one.seq_len_tokens) for one in requests]
        self._bytes.start(np.arange(len(requests)), costs)
        self._budget = np.array([request.budget_bytes for request in requests])

    def start(self, count: int) -> Flags:
        """Return the states of dense models: nothing is removed, (count, 2L)."""
        return np.zeros((count, self._blocks.shape[1]), dtype=bool)

    def position(self, plan: Plan) -> Flags:
        """Return the blocks that a mask removes, (2L,)."""
        mask = only_mask(plan, "RAPPrune-v0 removes blocks only; lower items in RAPPrune-v1.")
        removed = np.zeros(self._blocks.shape[1], dtype=bool)
        removed[sorted(mask.check(len(removed)).removed)] = True
        return removed

    def plan(self, positions: Flags) -> Plan:
        """Return the mask of a state."""
        return Plan(frozenset(np.flatnonzero(positions).tolist()))

    def over_bytes(self, which: Counts, removed: Flags) -> Counts:
        """Return the bytes above the budget, 0 where the request fits.

        Args:
            which: Index of each mask's request, (n,).
            removed: The blocks that each mask removes, (n, 2L).

        Returns:
            Bytes, (n,).
        """
        peak = self._bytes.peaks_of(which, removed)
        return np.asarray(np.maximum(0, peak - self._budget[which]))

    def observe(self, which: Counts, removed: Flags) -> Observation:
        """Return the observations of masks; the arguments are those of `over_bytes`.

        Returns:
            ``request`` (n, R), ``blocks`` (n, 2L, F) and ``action_mask`` (n, 2L), all float32.
        """
        request, blocks = self._request[which], self._blocks[which]
        over = self.over_bytes(which, removed) / self._bytes.dense_peak_bytes[which]
        request[:, BYTES_OVER] = np.minimum(1.0, over)
        kept = (~removed).astype(np.float32)
        blocks[:, :, KEPT_AND_FREED] *= kept[:, :, None]
        return {"request": request, "blocks": blocks, "action_mask": kept}

    def act(self, which: Counts, removed: Flags, blocks: Counts) -> Flags:
        """Return the states after one more block each, (n,), was removed."""
        found = removed.copy()
        found[np.arange(len(blocks)), blocks] = True
        return found

    def right_actions(self, which: Counts, removed: Flags, targets: Flags) -> Flags:
        """Return the blocks that targets remove and states do not, (n, 2L)."""
        return np.asarray(targets & ~removed)

    def distance(self, which: Counts, targets: Flags) -> Counts:
        """Return the number of blocks that each target removes, (n,)."""
        return np.asarray(targets.sum(axis=1))

    def walk(
        self, which: Counts, targets: Flags, steps: Counts, rng: np.random.Generator
    ) -> tuple[Flags, Flags]:
        """Sample subsets of targets with so many blocks, (n,), and the blocks that they lack."""
        order = np.where(targets, rng.random(targets.shape), np.inf).argsort(axis=1)
        removed = np.asarray(order.argsort(axis=1) < steps[:, None])
        return removed, self.right_actions(which, removed, targets)


def make_builder(context: PruningContext, ladder: Mapping[str, Any] | None) -> Builder:
    """Make what builds the observations of a context's model.

    Args:
        context: The model with the importance that an agent observes.
        ladder: `Ladder.spec` of the items of `RAPPrune-v1`; None for `RAPPrune-v0`.
    """
    if ladder is None:
        return ObservationBuilder(context.memory, context.features)
    item_bytes = LadderBytes(context.memory, Ladder.of(context.memory.facts, **ladder))
    return ItemObservationBuilder(item_bytes, item_importance(context, item_bytes))


def make_observer(builder: Builder, requests: Sequence[Request]) -> Observer:
    """Make the observer of a builder's kind."""
    if isinstance(builder, ItemObservationBuilder):
        return PlanObserver(builder, requests)
    return MaskObserver(builder, requests)


def memory_of(builder: Builder) -> MemoryModel:
    """Return the byte arithmetic of a builder's model."""
    if isinstance(builder, ItemObservationBuilder):
        return builder.item_bytes.memory
    return builder.memory


def check_feasible(builder: Builder, request: Request) -> None:
    """Reject a request that the model cannot serve, or whose budget nothing can meet.

    Raises:
        InvalidRequestError: The model cannot serve the batch size or the length.
        InfeasibleBudgetError: No mask, or no plan of the ladder, fits the budget.
    """
    memory = memory_of(builder)
    memory.check(request.batch_size, request.seq_len_tokens)
    if isinstance(builder, ItemObservationBuilder):
        builder.item_bytes.check_feasible(request)
    else:
        memory.check_feasible(request)


def as_tensors(observation: Observation) -> dict[str, torch.Tensor]:
    """Return an observation as tensors that share its memory."""
    return {key: torch.from_numpy(array) for key, array in observation.items()}
