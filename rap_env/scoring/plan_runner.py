"""Runs plans over a text and computes each block that several share only once.

They form a prefix tree over the steps of the model: two plans share all steps up to the first block
whose weights or cache differ in level. Plans that differ in the embeddings share nothing.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import torch

from rap_env.levels import WeightLevel
from rap_env.models.live.partial_forward import PartialForward
from rap_env.plan import Plan

T = TypeVar("T")

Steps = tuple[tuple[int, ...], ...]
"""Blocks that run together, in order (`PartialForward.steps`)."""

Node = tuple[int, Plan]
"""A node of the prefix tree: the number of a step, and the plan of what runs before that step."""

Visit = Callable[[Node, torch.Tensor], None]
"""Receives a node and the hidden state that enters it; must keep the state to use it later."""


@lru_cache(maxsize=4096)
def plan_prefixes(plan: Plan, steps: Steps) -> tuple[Plan, ...]:
    """The part of a plan before each step; the last entry is the plan itself."""
    prefixes: list[Plan] = []
    for step in steps:
        prefix = plan.before(step[0])
        # Equal prefixes are one object, which makes comparing and hashing them cheap.
        prefixes.append(prefixes[-1] if prefixes and prefixes[-1] == prefix else prefix)
    return (*prefixes, plan)


@lru_cache(maxsize=4096)
def plan_steps(plan: Plan, steps: Steps) -> tuple[Plan, ...]:
    """The part of a plan that concerns the blocks of each step, without the embeddings."""
    return tuple(
        Plan(
            plan.removed.intersection(step),
            tuple(pair for pair in plan.weights if pair[0] in step),
            tuple(pair for pair in plan.caches if 2 * pair[0] in step),
        )
        for step in steps
    )


def sharing_order(plan: Plan, num_blocks: int) -> tuple[Any, ...]:
    """Sort key that puts plans next to those with which they share most of their first steps.

    At each block, plans that keep it natively come first and those that remove it last.
    """
    steps = []
    for index in range(num_blocks):
        weights = plan.weight_level(index)
        cache = "" if index % 2 else plan.cache_level(index // 2).name
        own = "" if weights in ("native", "removed") else weights
        steps.append((weights == "removed", own, "" if cache == "native" else cache))
    return ("" if plan.embeddings == "native" else plan.embeddings, *steps)


class StateCache:
    """Hidden states by batch of windows and node; evicts the least recently used state."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.held_bytes = 0
        self._states: OrderedDict[tuple[int, Node], torch.Tensor] = OrderedDict()

    def put(self, batch: int, node: Node, state: torch.Tensor) -> None:
        """Keep a state; without effect if it alone is larger than the cap.

        A state that is a part of a larger tensor, such as one of several that ran in one batch, is
        copied: as a view, it would keep all of that tensor in memory.
        """
        key = (batch, node)
        self._drop(key)
        if state.untyped_storage().nbytes() > state.nbytes:
            state = state.clone()
        self._states[key] = state
        self.held_bytes += state.nbytes
        while self.held_bytes > self.max_bytes:
            self._drop(next(iter(self._states)))

    def put_some(
        self, nodes: Collection[Node], batch: int, node: Node, state: torch.Tensor
    ) -> None:
        """Keep a state if its node is among some."""
        if node in nodes:
            self.put(batch, node, state)

    def get(self, batch: int, node: Node) -> torch.Tensor | None:
        """The state of a node, or None."""
        key = (batch, node)
        if key in self._states:
            self._states.move_to_end(key)
        return self._states.get(key)

    def clear(self) -> None:
        """Drop all states."""
        self._states.clear()
        self.held_bytes = 0

    def _drop(self, key: tuple[int, Node]) -> None:
        state = self._states.pop(key, None)
        if state is not None:
            self.held_bytes -= state.nbytes


def branch_nodes(plans: Sequence[Plan], steps: Steps) -> set[Node]:
    """The nodes at which later plans of a list leave the path of earlier ones.

    Plans and steps are in the order in which they run.
    """
    paths = [plan_prefixes(plan, steps)[:-1] for plan in plans]
    leaves = [_last_shared(*two) for two in itertools.pairwise(paths)]
    nodes = set()
    for place, path in enumerate(paths[:-1]):
        nearest = len(steps)
        for leave in leaves[place:]:
            if leave < 0:
                break  # from there on nothing is shared
            if leave < nearest:
                nearest = leave
                node = (nearest, path[nearest])
                if node in nodes:
                    break  # an earlier plan keeps this node and all nodes before it
                nodes.add(node)
    return nodes


def _last_shared(one: Sequence[Plan], other: Sequence[Plan]) -> int:
    """The last step that two paths enter in the same state; -1 if their embeddings differ."""
    pairs = enumerate(zip(one, other, strict=True))
    return max((step for step, (a, b) in pairs if a == b), default=-1)


class PlanRunner:
    """Runs plans from the nearest cached states.

    The plans of one call advance together, one step at a time. A step runs once for all plans
    that agree on everything before it; plans that differ there but run this step at the same
    levels may share a batch. `batches` are the token ids of the text, each of shape (windows, T).
    At most `width` states share a batch; above 1, results may differ by the dtype's rounding.
    `block_runs` counts a block once for each batch of the text and state.
    """

    def __init__(
        self,
        partial: PartialForward,
        batches: Sequence[torch.Tensor],
        cache: StateCache,
        width: int = 1,
    ) -> None:
        self.partial = partial
        self.batches = batches
        self.cache = cache
        self.width = width
        self.block_runs = 0
        self._depth = len(partial.steps)

    def prefixes(self, plan: Plan) -> tuple[Plan, ...]:
        """The part of a plan before each step; the last entry is the plan itself."""
        return plan_prefixes(plan, self.partial.steps)

    def run(self, batch: int, plans: Sequence[Plan], visit: Visit) -> dict[Plan, torch.Tensor]:
        """Run plans on one batch of the text; returns each one's output, (windows, T, H).

        `visit` is called with the state that enters each step.
        """
        starts = {plan: self._nearest(batch, plan) for plan in plans}
        first = min(step for step, _ in starts.values())
        states: dict[Plan, torch.Tensor] = {}  # by the plan of what ran before the step
        for number in range(first, self._depth):
            for plan, (step, at) in starts.items():
                if step == number:
                    states[self.prefixes(plan)[number]] = at
            for prefix, state in states.items():
                visit((number, prefix), state)
            started = [plan for plan in plans if starts[plan][0] <= number]
            states = self._advance(number, states, started)
        return states

    def share_head(self, plans: Iterable[Plan]) -> Iterator[tuple[WeightLevel, Sequence[Plan]]]:
        """Groups of plans that may share a batch in the last norm and the head, and their level."""
        by_level: dict[WeightLevel, list[Plan]] = {}
        for plan in plans:
            by_level.setdefault(plan.embeddings, []).append(plan)
        for level, alike in by_level.items():
            for group in chunks(alike, self.width):
                yield level, group

    def _nearest(self, batch: int, plan: Plan) -> tuple[int, torch.Tensor]:
        """The last step whose state is cached for a plan, and that state."""
        prefixes = self.prefixes(plan)
        for number in reversed(range(self._depth)):
            state = self.cache.get(batch, (number, prefixes[number]))
            if state is not None:
                return number, state
        entered = self.partial.enter(self.batches[batch], plan.embeddings)
        self.cache.put(batch, (0, prefixes[0]), entered)
        return 0, entered

    def _advance(
        self, number: int, states: dict[Plan, torch.Tensor], plans: Sequence[Plan]
    ) -> dict[Plan, torch.Tensor]:
        """Run one step: from the states that enter it to its outputs, by the plan so far."""
        blocks, steps = self.partial.steps[number], self.partial.steps
        # For each way in which plans run this step: the prefix before and after it.
        ends: dict[Plan, dict[Plan, Plan]] = {}
        for plan in plans:
            prefixes = self.prefixes(plan)
            within = plan_steps(plan, steps)[number]
            ends.setdefault(within, {})[prefixes[number]] = prefixes[number + 1]
        after: dict[Plan, torch.Tensor] = {}
        for within, prefix_after in ends.items():
            kept = len(blocks) - len(within.removed)
            for group in chunks(list(prefix_after), self.width if kept else 1):
                self.block_runs += kept * len(group)
                inputs = [states[prefix] for prefix in group]
                output = self.partial.run(blocks, as_one_batch(inputs), within)
                outputs = torch.split(output, [len(state) for state in inputs])
                after |= {prefix_after[p]: own for p, own in zip(group, outputs, strict=True)}
        return after


def as_one_batch(states: Sequence[torch.Tensor]) -> torch.Tensor:
    """States as one batch; a single one is not copied."""
    return states[0] if len(states) == 1 else torch.cat(list(states))


def chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Cut a sequence into parts of at most `size`."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
