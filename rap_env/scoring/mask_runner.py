"""Runs masks over a text, with the blocks that they share run once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from rap_env.llm.partial_forward import PartialForward
from rap_env.scoring.states import Node, StateCache

T = TypeVar("T")


Visit = Callable[[Node, torch.Tensor], None]
"""What is done with the state that enters a node; whoever wants it later has to hold it."""


class MaskRunner:
    """Runs masks, given as bits, from the nearest states that are known.

    The masks of one call advance together, a step at a time: a step is run once for all
    masks that removed the same blocks before it, and those that removed other blocks but keep
    this one may share a batch.

    Args:
        partial: The model.
        batches: The text: token ids, each of shape (windows, T).
        cache: Known states.
        width: Most states that share a batch. Above 1, results may differ by the dtype's rounding.

    Attributes:
        block_runs: Blocks that were run, counted once for each batch of the text and state.
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
        self.lows = [(1 << step[0]) - 1 for step in partial.steps]
        self._depth = len(partial.steps)

    def run(self, batch: int, masks: Sequence[int], visit: Visit) -> dict[int, torch.Tensor]:
        """Run masks on one batch of the text.

        Args:
            batch: Its number.
            masks: The masks as bits.
            visit: Called with every state that is passed, what leaves the last step included.

        Returns:
            What left the last step, by mask, (windows, T, H).
        """
        starts = {mask: self._nearest(batch, mask) for mask in masks}
        first = min(step for step, _ in starts.values())
        states: dict[int, torch.Tensor] = {}  # by the blocks removed before the step
        for number in range(first, self._depth):
            low = self.lows[number]
            states |= {mask & low: at for mask, (step, at) in starts.items() if step == number}
            for prefix, state in states.items():
                visit((number, prefix), state)
            going = [mask for mask in masks if starts[mask][0] <= number]
            states = self._advance(number, states, going)
        states |= {mask: at for mask, (step, at) in starts.items() if step == self._depth}
        for mask, state in states.items():
            visit((self._depth, mask), state)
        return states

    def _nearest(self, batch: int, mask: int) -> tuple[int, torch.Tensor]:
        """The last step whose state is known for a mask, and that state."""
        for number in range(self._depth, -1, -1):
            prefix = mask if number == self._depth else mask & self.lows[number]
            state = self.cache.get(batch, (number, prefix))
            if state is not None:
                return number, state
        entered = self.partial.enter(self.batches[batch])
        self.cache.put(batch, (0, 0), entered)
        return 0, entered

    def _advance(
        self, number: int, states: dict[int, torch.Tensor], masks: Sequence[int]
    ) -> dict[int, torch.Tensor]:
        """From what enters a step to what leaves it, both by the blocks removed so far."""
        blocks = self.partial.steps[number]
        low, own = self.lows[number], sum(1 << block for block in blocks)
        wanted = {(mask & low, mask & own) for mask in masks}
        after: dict[int, torch.Tensor] = {}
        for removed in {removed for _, removed in wanted}:
            kept = tuple(block for block in blocks if not removed >> block & 1)
            gone = tuple(block for block in blocks if removed >> block & 1)
            prefixes = sorted(prefix for prefix, own_gone in wanted if own_gone == removed)
            for group in chunks(prefixes, self.width if kept else 1):
                outputs = self._run_together(kept, gone, [states[prefix] for prefix in group])
                after |= {p | removed: out for p, out in zip(group, outputs, strict=True)}
        return after

    def _run_together(
        self, kept: tuple[int, ...], gone: tuple[int, ...], states: list[torch.Tensor]
    ) -> Sequence[torch.Tensor]:
        self.block_runs += len(kept) * len(states)
        if len(states) == 1:
            return [self.partial.run(kept, states[0], gone)]
        together = self.partial.run(kept, torch.cat(states), gone)
        return torch.split(together, [len(s) for s in states])


def chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Cut a sequence into parts of at most `size`."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
