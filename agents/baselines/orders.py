"""Baselines that score nothing per request: fixed orders of removal, and the frontier table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from agents.baselines.base import Baseline, CountingScorer, fits, price_per_byte
from agents.baselines.searches import whole_layer
from rap_env.blocks import BlockKind
from rap_env.costs import request_costs
from rap_env.plan import Plan
from rap_env.request import Request

if TYPE_CHECKING:
    from rap_env.context.base import PruningContext


class OrderBaseline(Baseline):
    """Removes blocks in an order, `_blocks` or one that depends on the request, until it fits."""

    _blocks: Sequence[int] = ()

    def _choose(self, request: Request, scores: CountingScorer) -> Plan:
        costs = request_costs(self.memory, request.batch_size, request.seq_len_tokens)
        return costs.remove_until_fits(self._order(request), request.budget_bytes)

    def _order(self, request: Request) -> Sequence[int]:
        """Return block indices in order of removal."""
        return self._blocks


class RandomBaseline(OrderBaseline):
    """Removes blocks at random; the same seed and request give the same mask."""

    name = "random"
    seeded = True

    def _order(self, request: Request) -> Sequence[int]:
        key = [self.seed, request.batch_size, request.seq_len_tokens, request.budget_bytes]
        order: list[int] = (
            np.random.default_rng(key).permutation(self.memory.facts.num_blocks).tolist()
        )
        return order


class DenseBaseline(OrderBaseline):
    """Removes nothing; the reference, which seldom fits."""

    name = "dense"
    kv_aware = False


class OneShotBaseline(OrderBaseline):
    """Removes blocks in ascending order of their one-shot importance."""

    name = "one_shot"

    def __init__(self, context: PruningContext, seed: int = 0) -> None:
        super().__init__(context, seed)
        self._delta_nll = np.asarray(context.one_shot.delta_nll, dtype=np.float64)
        self._blocks = _ascending(self._delta_nll)
        # The dense model, and the model without each block in turn.
        self.setup_evaluations = self.memory.facts.num_blocks + 1


class OneShotPerByteBaseline(OneShotBaseline):
    """Removes blocks in ascending order of one-shot importance per byte freed for the request."""

    name = "one_shot_per_byte"

    def _order(self, request: Request) -> Sequence[int]:
        freed = self.memory.freed_bytes(request)
        prices = [price_per_byte(*pair) for pair in zip(self._delta_nll, freed, strict=True)]
        return _ascending(np.array(prices))


class _OneKindBaseline(OneShotBaseline):
    """The one-shot order within one kind of block; may end before the request fits."""

    kind: BlockKind

    def _order(self, request: Request) -> Sequence[int]:
        kinds = {block.index: block.kind for block in self.memory.facts.blocks}
        return [index for index in self._blocks if kinds[index] == self.kind]


class AttentionOnlyBaseline(_OneKindBaseline):
    """Removes attention blocks only, in one-shot order."""

    name = "attention_only"
    kind = "attn"


class FFNOnlyBaseline(_OneKindBaseline):
    """Removes feed-forward blocks only, in one-shot order."""

    name = "ffn_only"
    kind = "ffn"


class BlockInfluenceBaseline(OrderBaseline):
    """Removes the blocks that change the hidden state least (ShortGPT, arXiv 2403.03853).

    Deviates from the paper: attention and FFN blocks are ranked separately and not as one layer.
    """

    name = "block_influence"
    setup_evaluations = 1  # one pass of the dense model measures all blocks

    def __init__(self, context: PruningContext, seed: int = 0) -> None:
        super().__init__(context, seed)
        self._blocks = _ascending(context.one_shot.block_influence)


class GSIBaseline(OrderBaseline):
    """Follows the GSI order until the request fits.

    Blocks that GSI did not remove follow in the order of their losses in its last round.
    """

    name = "gsi"

    def __init__(self, context: PruningContext, seed: int = 0) -> None:
        super().__init__(context, seed)
        self._blocks = context.gsi.full_order
        self.setup_evaluations = context.gsi.evaluations


class ShortGPTBaseline(Baseline):
    """Removes the layers that change the hidden state least (Men et al. 2024).

    arXiv 2403.03853: block influence (eq. 1) of each whole layer of the dense model, measured
    once. Deviates from the paper: layers are removed until the request fits and not until a
    given number is removed.
    """

    name = "shortgpt"
    setup_evaluations = 1  # one pass of the dense model measures all layers

    def __init__(self, context: PruningContext, seed: int = 0) -> None:
        super().__init__(context, seed)
        self._layers = _ascending(context.layer_influence)

    def _choose(self, request: Request, scores: CountingScorer) -> Plan:
        mask = Plan()
        for layer in self._layers:
            if fits(self.memory, mask, request):
                break
            mask = mask.without(*whole_layer(layer).removed)
        return mask


class FrontierBaseline(Baseline):
    """Looks up the known mask of lowest NLL under which the request fits.

    Where no known mask fits it follows the GSI order.

    Raises:
        ArtifactError: No known mask fits, and the context has no GSI order.
    """

    name = "frontier"

    def __init__(self, context: PruningContext, seed: int = 0) -> None:
        super().__init__(context, seed)
        self._context = context
        self._frontier = context.frontier
        self.setup_evaluations = self._frontier.evaluations

    def _choose(self, request: Request, scores: CountingScorer) -> Plan:
        if fits(self.memory, Plan(), request):
            return Plan()
        found = self._frontier.best(self.memory, request)
        return GSIBaseline(self._context).choose(request) if found is None else found


def _ascending(values: npt.NDArray[np.float64]) -> list[int]:
    order: list[int] = np.argsort(values, kind="stable").tolist()
    return order
