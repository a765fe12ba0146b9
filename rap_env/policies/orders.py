"""Methods that score nothing per request and follow an order of removal, or of steps."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from rap_env.context.base import method_order
from rap_env.plan import Plan
from rap_env.policies.method import Basis, CountingScorer, Method, price_per_byte
from rap_env.policies.registry import register
from rap_env.request import Request


@register
class Random(Method):
    """Lowers random items; the same seed and request give the same plan."""

    name = "random"

    def _choose(self, request: Request, scores: CountingScorer) -> Plan:
        rng = self.random(request)
        if self.ladder.removes_only:
            return self.remove(one_by_one(rng.permutation(len(self.ladder)).tolist()), request)
        state = self.costs(request).state()
        while state.peak_bytes > request.budget_bytes:
            valid = [item for item in range(len(self.ladder)) if state.is_valid(item)]
            state.lower(int(rng.choice(valid)))
        return state.plan


class _OrderOfSteps(Method):
    """Follows an order of steps, each an item and the position of its next level, until it fits."""

    def __init__(self, basis: Basis) -> None:
        super().__init__(basis)
        self._steps, self.setup_evaluations = method_order(
            basis.context, self.ladder_bytes, self.name
        )

    def _choose(self, request: Request, scores: CountingScorer) -> Plan:
        return self.costs(request).lower_until_fits(self._steps, request.budget_bytes)


@register
class OneShot(_OrderOfSteps):
    """Follows one-shot importance, which is measured once, from the native model.

    Blocks are removed in ascending order of it. Where items have further levels, the order is
    greedy by one-shot cost per byte, at a reference request.
    """

    name = "one_shot"


@register
class GSI(_OrderOfSteps):
    """Follows the order of greedy sequential importance, measured again after each step.

    Blocks that GSI did not remove follow in the order of their losses in its last round.
    Where items have further levels, the order is that of the cost per byte.
    """

    name = "gsi"


class _OneShotRemoval(Method):
    """Removes blocks in an order by their one-shot importance, and lowers nothing else."""

    def __init__(self, basis: Basis) -> None:
        super().__init__(basis)
        profile = self.context.one_shot
        self._delta_nll, self.setup_evaluations = profile.delta_nll, profile.evaluations

    def _choose(self, request: Request, scores: CountingScorer) -> Plan:
        return self.remove(one_by_one(self._order(request)), request)

    def _order(self, request: Request) -> list[int]:
        """The blocks in ascending order of importance."""
        return ascending(self._delta_nll)


@register
class OneShotPerByte(_OneShotRemoval):
    """Removes blocks in ascending order of one-shot importance per byte freed for the request."""

    name = "one_shot_per_byte"

    def _order(self, request: Request) -> list[int]:
        freed = self.memory.freed_bytes(request)
        prices = [price_per_byte(*pair) for pair in zip(self._delta_nll, freed, strict=True)]
        return ascending(np.array(prices))


@register
class BlockInfluence(Method):
    """Removes the blocks that change the hidden state least (ShortGPT, arXiv 2403.03853).

    Deviates from the paper: attention and FFN blocks are ranked separately and not as one
    layer.
    """

    name = "block_influence"
    setup_evaluations = 1  # one pass of the native model measures all blocks

    def _choose(self, request: Request, scores: CountingScorer) -> Plan:
        return self.remove(one_by_one(ascending(self.context.one_shot.block_influence)), request)


@register
class ShortGPT(Method):
    """Removes the layers that change the hidden state least (Men et al. 2024).

    arXiv 2403.03853: block influence (eq. 1) of each whole layer of the native model,
    measured once. Deviates from the paper: layers are removed until the request fits and not
    until a given number is removed.
    """

    name = "shortgpt"
    setup_evaluations = 1  # one pass of the native model measures all layers

    def __init__(self, basis: Basis) -> None:
        super().__init__(basis)
        self._layers = ascending(self.context.layer_influence)

    def _choose(self, request: Request, scores: CountingScorer) -> Plan:
        return self.remove(map(whole_layer, self._layers), request)


def one_by_one(blocks: Iterable[int]) -> Iterable[tuple[int]]:
    """Blocks that are removed one by one, as groups for `Method.remove`."""
    return ((index,) for index in blocks)


def whole_layer(layer: int) -> tuple[int, int]:
    """The two blocks of a layer."""
    return 2 * layer, 2 * layer + 1


def ascending(values: npt.ArrayLike) -> list[int]:
    """Indices in ascending order of their values; equal ones keep their order."""
    order: list[int] = np.argsort(np.asarray(values), kind="stable").tolist()
    return order
