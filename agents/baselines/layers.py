"""Methods that remove whole layers: the attention and the ffn block of a layer go together."""

from __future__ import annotations

import numpy as np

from agents.baselines.base import Baseline, Tally, fits
from agents.baselines.bench import Bench
from rap_env.blocks import BlockMask
from rap_env.request import Request


class ShortGPTBaseline(Baseline):
    """Removes the layers that turn the hidden state least (Men et al. 2024).

    arXiv 2403.03853: block influence (eq. 1) of each whole layer of the dense model, measured
    once; here layers go until the request fits and not until a given number is gone.
    """

    name = "shortgpt"

    def __init__(self, context: Bench, seed: int = 0) -> None:
        super().__init__(context, seed)
        self._layers = np.argsort(context.layer_influence, kind="stable").tolist()

    @property
    def setup_evaluations(self) -> int:
        """One pass of the dense model gives the influence of all layers."""
        return 1

    def _choose(self, request: Request) -> tuple[BlockMask, int]:
        mask = BlockMask()
        for layer in self._layers:
            if fits(self.memory, mask, request):
                break
            mask |= _layer(layer)
        return mask, 0


class SLEBBaseline(Baseline):
    """Removes, again and again, the layer without which the NLL is least (Song et al. 2024).

    arXiv 2402.09025, Algorithm 1: after each removal all layers that are left are measured
    again. The order is the same for every request, and each request is charged with as much of
    it as it needs.
    """

    name = "sleb"

    def _choose(self, request: Request) -> tuple[BlockMask, int]:
        tally = Tally(self.scorer)
        mask = BlockMask()
        left = set(range(self.memory.facts.num_layers))
        while not fits(self.memory, mask, request):
            nearest = {layer: mask | _layer(layer) for layer in sorted(left)}
            mask = tally.best(list(nearest.values()))
            left = {layer for layer in left if not _layer(layer) <= mask}
        return mask, tally.evaluations


def _layer(number: int) -> BlockMask:
    """Both blocks of a layer."""
    return BlockMask.of(2 * number, 2 * number + 1)
