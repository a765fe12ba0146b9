"""Hidden states that several masks share, within a memory cap."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence

import torch

Node = tuple[int, int]
"""A place in the tree of masks: a step, and the blocks removed before it as bits."""


class StateCache:
    """What enters a step, by batch of windows and node; the longest unused one goes first.

    Args:
        max_bytes: Most bytes of hidden states that are kept.
    """

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
        """Forget all."""
        self._states.clear()
        self.held_bytes = 0

    def _drop(self, key: tuple[int, Node]) -> None:
        state = self._states.pop(key, None)
        if state is not None:
            self.held_bytes -= state.nbytes


def branch_nodes(masks: Sequence[int], steps: Sequence[tuple[int, ...]]) -> set[Node]:
    """The nodes at which later masks of a list leave the path of earlier ones.

    Args:
        masks: Masks as bits, in the order in which they will be run.
        steps: Blocks that are run together, in order.
    """
    lows = [(1 << step[0]) - 1 for step in steps]
    leaves = [
        max(number for number, low in enumerate(lows) if not (before ^ after) & low)
        for before, after in itertools.pairwise(masks)
    ]
    nodes = set()
    for place, mask in enumerate(masks[:-1]):
        nearest = len(steps)
        for leave in leaves[place:]:
            if leave < nearest:
                nearest = leave
                node = (nearest, mask & lows[nearest])
                if node in nodes:
                    break  # an earlier mask keeps this one, and all before it
                nodes.add(node)
    return nodes
