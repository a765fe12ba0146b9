"""The best mask there is, by trying all, for models that are small enough."""

from __future__ import annotations

import itertools

from agents.baselines.base import Baseline, Tally, fits
from agents.baselines.bench import Bench
from rap_env.blocks import BlockMask
from rap_env.errors import SearchTooLargeError
from rap_env.request import Request

MOST_BLOCKS = 12
"""Blocks of the largest model whose masks are all scored: 4,096 of them."""


class OracleBaseline(Baseline):
    """The least loss of all masks under which the request fits, by brute force.

    Masks that remove more than they must are tried too, since a removal may lower the loss.
    As with every baseline nothing is removed where the dense model fits. Requests share the
    scores: with 12 blocks at most 4,096 masks are ever run.

    Raises:
        SearchTooLargeError: The model has more than `MOST_BLOCKS` blocks.
    """

    name = "oracle"

    def __init__(self, context: Bench, seed: int = 0) -> None:
        super().__init__(context, seed)
        blocks = self.memory.facts.num_blocks
        if blocks > MOST_BLOCKS:
            raise SearchTooLargeError(
                f"The baseline 'oracle' scores every mask, but {self.memory.facts.name} has "
                f"{blocks} blocks and so 2^{blocks} masks; take a model of at most {MOST_BLOCKS} "
                "blocks, or another baseline such as 'evolutionary'."
            )
        self._masks = [
            BlockMask.of(*chosen)
            for count in range(blocks + 1)
            for chosen in itertools.combinations(range(blocks), count)
        ]

    def _choose(self, request: Request) -> tuple[BlockMask, int]:
        if fits(self.memory, BlockMask(), request):
            return BlockMask(), 0
        tally = Tally(self.scorer)
        best = tally.best([mask for mask in self._masks if fits(self.memory, mask, request)])
        return best, tally.evaluations
