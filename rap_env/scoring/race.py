"""Masks on their way through a text, batch by batch, with a common base run once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial, reduce

import torch

from rap_env.blocks import BlockMask
from rap_env.scoring.mask_runner import chunks
from rap_env.scoring.scorer import MaskScorer, to_bits
from rap_env.scoring.states import Node

Trail = dict[tuple[int, Node], torch.Tensor]


@dataclass
class Racer:
    """A mask on its way.

    Attributes:
        mask: The mask.
        hidden: What the decoder gave for each batch of the text that was run.
        parts: For each batch, what it adds to the text's NLL, or is known to add at least.
        windows: For each batch that was measured to the end, the NLL of its windows.
    """

    mask: BlockMask
    hidden: dict[int, torch.Tensor] = field(default_factory=dict)
    parts: dict[int, float] = field(default_factory=dict)
    windows: dict[int, torch.Tensor] = field(default_factory=dict)
    trail: Trail = field(default_factory=dict, repr=False)

    @property
    def nll(self) -> float:
        """What the batches add up to, nats per token of the whole text."""
        return sum(self.parts.values())


class Race:
    """Runs masks that have a base in common, such as the candidates of one round.

    States of the base serve all of them. States of a single mask are held until it is known
    whether it wins, since then the next round begins with them.

    Args:
        scorer: Whose text is run.
        masks: The masks; all blocks that they remove in common are the base.
    """

    def __init__(self, scorer: MaskScorer, masks: Sequence[BlockMask]) -> None:
        self._scorer = scorer
        self.base = reduce(lambda a, b: a & b, masks)
        self._base_bits = to_bits(self.base)
        self._lows = [*scorer.runner.lows, -1]
        self._capped = scorer.llm.spare_bytes is not None
        windows = scorer.corpus.tokens.shape[0]
        self.shares = [len(ids) / windows for ids in scorer.batches]

    def run(self, racers: Sequence[Racer], batch: int, *, trails: bool = True) -> None:
        """Run masks on a batch of the text.

        Args:
            racers: The masks.
            batch: Number of the batch.
            trails: Whether to hold the states of masks that are run alone, as long as it is open
                whether they win. Never where memory is capped.
        """
        runner = self._scorer.runner
        for group in chunks(racers, self._scorer.in_flight):
            trail = group[0].trail if trails and len(group) == 1 and not self._capped else None
            visit = partial(self._visit, batch, trail)
            last = runner.run(batch, [to_bits(racer.mask) for racer in group], visit)
            for racer in group:
                racer.hidden[batch] = runner.partial.leave(last[to_bits(racer.mask)])

    def crown(self, winner: Racer) -> None:
        """Keep the winner's states for whatever begins where it ended."""
        for (batch, node), state in winner.trail.items():
            self._scorer.runner.cache.put(batch, node, state)

    def _visit(self, batch: int, trail: Trail | None, node: Node, state: torch.Tensor) -> None:
        number, prefix = node
        if number % self._scorer.stride:
            return
        if prefix == self._base_bits & self._lows[number]:
            self._scorer.runner.cache.put(batch, node, state)
        elif trail is not None:
            trail[batch, node] = state


def share_of(scorer: MaskScorer, mask: BlockMask, share: float, nll: torch.Tensor) -> float:
    """What a batch adds to the text's NLL.

    Raises:
        NonFiniteScoreError: It is NaN or infinite.
    """
    value = float(nll) * share
    if not math.isfinite(value):
        scorer.refuse(mask)
    return value
