"""Runs masks over a text and computes each block that several masks share only once.

The masks form a prefix tree over the steps of the model: two masks share all steps up to the
first block that only one of them removes.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import TypeVar

import torch

from rap_env.blocks import BlockMask
from rap_env.llm.partial_forward import PartialForward

T = TypeVar("T")

Steps = tuple[tuple[int, ...], ...]
"""Blocks that run together, in order (`PartialForward.steps`)."""

Node = tuple[int, BlockMask]
"""A node of the prefix tree: the number of a step, and the blocks removed before that step."""

Visit = Callable[[Node, torch.Tensor], None]
"""Receives a node and the hidden state that enters it; must keep the state to use it later."""


@lru_cache(maxsize=4096)
def mask_prefixes(mask: BlockMask, steps: Steps) -> tuple[BlockMask, ...]:
    """Blocks that a mask removes before each step; the last entry is the mask itself."""
    found: list[BlockMask] = []
    for first in (step[0] for step in steps):
        prefix = frozenset(index for index in mask.indices if index < first)
        # Equal prefixes are one object, which makes comparing and hashing them cheap.
        same = bool(found) and len(found[-1]) == len(prefix)
        found.append(found[-1] if same else BlockMask(prefix))
    return (*found, mask)


class StateCache:
    """Hidden states by batch of windows and node; evicts the least recently used state."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.held_bytes = 0
        self._states: OrderedDict[tuple[int, Node], torch.Tensor] = OrderedDict()

    def put(self, batch: int, node: Node, state: torch.Tensor) -> None:
        """Keep a state; without effect if it alone is larger than the cap."""
        key = (batch, node)
        self._drop(key)
        self._states[key] = state
        self.held_bytes += state.nbytes
        while self.held_bytes > self.max_bytes:
            self._drop(next(iter(self._states)))

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


def branch_nodes(masks: Sequence[BlockMask], steps: Steps) -> set[Node]:
    """The nodes at which later masks of a list leave the path of earlier ones.

    Masks and steps are in the order in which they run.
    """
    paths = [mask_prefixes(mask, steps)[:-1] for mask in masks]
    leaves = [
        max(step for step, pair in enumerate(zip(*two, strict=True)) if pair[0] == pair[1])
        for two in itertools.pairwise(paths)
    ]
    nodes = set()
    for place, path in enumerate(paths[:-1]):
        nearest = len(steps)
        for leave in leaves[place:]:
            if leave < nearest:
                nearest = leave
                node = (nearest, path[nearest])
                if node in nodes:
                    break  # an earlier mask keeps this node and all nodes before it
                nodes.add(node)
    return nodes


class MaskRunner:
    """Runs masks from the nearest cached states.

    The masks of one call advance together, one step at a time. A step runs once for all masks
    that removed the same blocks before it; masks that removed other blocks but keep the blocks
    of this step may share a batch. `batches` are the token ids of the text, each of shape
    (windows, T). At most `width` states share a batch; above 1, results may differ by the dtype's
    rounding. `block_runs` counts a block once for each batch of the text and state.
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

    def prefixes(self, mask: BlockMask) -> tuple[BlockMask, ...]:
        """Blocks that a mask removes before each step; the last entry is the mask itself."""
        return mask_prefixes(mask, self.partial.steps)

    def run(
        self, batch: int, masks: Sequence[BlockMask], visit: Visit
    ) -> dict[BlockMask, torch.Tensor]:
        """Run masks on one batch of the text; returns each one's output, (windows, T, H).

        `visit` is called with every state on the way, the output of the last step included.
        """
        starts = {mask: self._nearest(batch, mask) for mask in masks}
        first = min(step for step, _ in starts.values())
        states: dict[BlockMask, torch.Tensor] = {}  # by the blocks removed before the step
        for number in range(first, self._depth):
            for mask, (step, at) in starts.items():
                if step == number:
                    states[self.prefixes(mask)[number]] = at
            for prefix, state in states.items():
                visit((number, prefix), state)
            started = [mask for mask in masks if starts[mask][0] <= number]
            states = self._advance(number, states, started)
        states |= {mask: at for mask, (step, at) in starts.items() if step == self._depth}
        for mask, state in states.items():
            visit((self._depth, mask), state)
        return states

    def _nearest(self, batch: int, mask: BlockMask) -> tuple[int, torch.Tensor]:
        """The last step whose state is cached for a mask, and that state."""
        prefixes = self.prefixes(mask)
        for number in range(self._depth, -1, -1):
            state = self.cache.get(batch, (number, prefixes[number]))
            if state is not None:
                return number, state
        entered = self.partial.enter(self.batches[batch])
        self.cache.put(batch, (0, BlockMask()), entered)
        return 0, entered

    def _advance(
        self, number: int, states: dict[BlockMask, torch.Tensor], masks: Sequence[BlockMask]
    ) -> dict[BlockMask, torch.Tensor]:
        """Run one step: from the states that enter it to its outputs, by blocks removed so far."""
        blocks = self.partial.steps[number]
        # For the blocks of this step that some masks remove: the prefix before and after it.
        ends: dict[tuple[int, ...], dict[BlockMask, BlockMask]] = {}
        for mask in masks:
            removed = tuple(block for block in blocks if block in mask.indices)
            prefixes = self.prefixes(mask)
            ends.setdefault(removed, {})[prefixes[number]] = prefixes[number + 1]
        after: dict[BlockMask, torch.Tensor] = {}
        for removed, prefix_after in ends.items():
            kept = tuple(block for block in blocks if block not in removed)
            for group in chunks(list(prefix_after), self.width if kept else 1):
                outputs = self._run_together(kept, removed, [states[prefix] for prefix in group])
                for prefix, output in zip(group, outputs, strict=True):
                    after[prefix_after[prefix]] = output
        return after

    def _run_together(
        self, kept: tuple[int, ...], removed: tuple[int, ...], states: list[torch.Tensor]
    ) -> Sequence[torch.Tensor]:
        self.block_runs += len(kept) * len(states)
        if len(states) == 1:
            return [self.partial.run(kept, states[0], removed)]
        together = self.partial.run(kept, torch.cat(states), removed)
        return torch.split(together, [len(s) for s in states])


def chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Cut a sequence into parts of at most `size`."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
