"""Searches that score masks for each request: greedy, swaps, beam, whole layers, brute force."""

from __future__ import annotations

from typing import TYPE_CHECKING

from agents.baselines.base import Baseline, CountingScorer, fits, price_per_byte
from rap_env.errors import SearchTooLargeError
from rap_env.memory import MemoryModel
from rap_env.plan import Plan, every_mask
from rap_env.request import Request

if TYPE_CHECKING:
    from rap_env.context.base import PruningContext

MOST_BLOCKS = 12
"""Largest number of blocks for which `OracleBaseline` scores all masks (4,096)."""


class GreedyPerByteBaseline(Baseline):
    """Repeatedly removes the block with the lowest rise in NLL per byte that it frees.

    Bytes beyond what the request still needs do not count, so if several blocks each suffice
    alone, the one with the lowest rise in NLL is removed last, whatever its size. Each removal is
    followed by a scan of all kept blocks: with N blocks and k removals about ``k * N``
    evaluations per request.
    """

    name = "greedy_per_byte"

    def _choose(self, request: Request, scores: CountingScorer) -> Plan:
        return greedy_per_byte(self.memory, scores, request)


def greedy_per_byte(memory: MemoryModel, scores: CountingScorer, request: Request) -> Plan:
    """Return the mask of `GreedyPerByteBaseline`."""
    freed = memory.freed_bytes(request)
    mask = Plan()
    while not fits(memory, mask, request):
        over = memory.peak_bytes(mask, request) - request.budget_bytes
        nll = scores.nll(mask)
        kept = [index for index in range(memory.facts.num_blocks) if index not in mask.removed]
        without = scores.nll_many([mask.without(index) for index in kept])
        prices = {
            index: price_per_byte(value - nll, min(int(freed[index]), over))
            for index, value in zip(kept, without, strict=True)
        }
        mask = mask.without(min(kept, key=prices.__getitem__))
    return mask


class GreedySwapsBaseline(Baseline):
    """Improves the mask of `GreedyPerByteBaseline` by swaps at equal bytes.

    Every removed block is restored in turn, starting with the one whose return lowers the NLL
    most. The mask without it, and with any other block removed instead, is scored where it fits.
    The best of these is taken if it is better than the current mask, and the search starts
    again. It ends when no swap helps or when the evaluations are used up.

    Args:
        context: Memory model and scorer.
        seed: Unused; the search is deterministic.
        extra_evaluations: Upper limit of evaluations per request beyond those of the greedy
            search.
    """

    name = "greedy_swaps"

    def __init__(
        self, context: PruningContext, seed: int = 0, extra_evaluations: int = 500
    ) -> None:
        super().__init__(context, seed)
        self.extra_evaluations = extra_evaluations

    def _choose(self, request: Request, scores: CountingScorer) -> Plan:
        if fits(self.memory, Plan(), request):
            return Plan()
        mask = greedy_per_byte(self.memory, scores, request)
        limit = scores.evaluations + self.extra_evaluations
        while (better := self._improved(mask, scores, limit, request)) is not None:
            mask = better
        return mask

    def _improved(
        self, mask: Plan, scores: CountingScorer, limit: int, request: Request
    ) -> Plan | None:
        """Return a better mask one swap away; None if there is none within the limit."""
        restored = [Plan(mask.removed - {index}) for index in sorted(mask.removed)]
        for fewer in sorted(scores.first_affordable(restored, limit), key=scores.nll):
            near = scores.first_affordable(self._swaps(fewer, mask, request), limit)
            if near and scores.nll(best := scores.best(near)) < scores.nll(mask):
                return best
        return None

    def _swaps(self, fewer: Plan, mask: Plan, request: Request) -> list[Plan]:
        """Return `fewer`, and `fewer` with any block removed that `mask` keeps, where they fit."""
        blocks = range(self.memory.facts.num_blocks)
        grown = [fewer.without(index) for index in blocks if index not in mask.removed]
        return [near for near in (fewer, *grown) if fits(self.memory, near, request)]


class BeamBaseline(Baseline):
    """Beam search over masks by the rise in NLL per useful byte that they free.

    In each round every mask of the beam that does not fit yet is extended by every further block,
    and the best masks form the next beam; masks that fit stay as they are. Bytes beyond what the
    request needs do not count, so among masks that fit the NLL decides. The search ends when the
    whole beam fits, and returns the lowest NLL of all scored masks that fit. It needs about
    `width` times the evaluations of ``greedy_per_byte``.

    Args:
        context: Memory model and scorer.
        seed: Unused; the search is deterministic.
        width: Masks in the beam, at least 1.
    """

    name = "beam"

    def __init__(self, context: PruningContext, seed: int = 0, width: int = 4) -> None:
        super().__init__(context, seed)
        self.width = width

    def _choose(self, request: Request, scores: CountingScorer) -> Plan:
        beam, ended = [Plan()], set[Plan]()
        while unfit := [mask for mask in beam if not fits(self.memory, mask, request)]:
            grown = [child for mask in unfit for child in self._children(mask)]
            masks = list(dict.fromkeys([*(mask for mask in beam if mask not in unfit), *grown]))
            scores.nll_many([Plan(), *masks])  # in one call, since they share prefixes
            ended |= {mask for mask in masks if fits(self.memory, mask, request)}
            beam = sorted(masks, key=lambda m: self._price(scores, m, request))[: self.width]
        return (
            scores.best(sorted(ended, key=lambda mask: sorted(mask.removed))) if ended else Plan()
        )

    def _children(self, mask: Plan) -> list[Plan]:
        blocks = range(self.memory.facts.num_blocks)
        return [mask.without(index) for index in blocks if index not in mask.removed]

    def _price(self, scores: CountingScorer, mask: Plan, request: Request) -> float:
        """Rise in NLL of a mask per useful byte."""
        dense_bytes = self.memory.dense_peak_bytes(request.batch_size, request.seq_len_tokens)
        freed = dense_bytes - self.memory.peak_bytes(mask, request)
        delta_nll = scores.nll(mask) - scores.nll(Plan())
        return price_per_byte(delta_nll, min(freed, dense_bytes - request.budget_bytes))


class SLEBBaseline(Baseline):
    """Repeatedly removes the layer whose removal gives the lowest NLL (Song et al. 2024).

    arXiv 2402.09025, Algorithm 1: after each removal all remaining layers are measured again. The
    order is the same for every request, and each request is charged with the part that it uses.
    """

    name = "sleb"

    def _choose(self, request: Request, scores: CountingScorer) -> Plan:
        mask = Plan()
        left = set(range(self.memory.facts.num_layers))
        while not fits(self.memory, mask, request):
            mask = scores.best(
                [mask.without(*whole_layer(layer).removed) for layer in sorted(left)]
            )
            left = {layer for layer in left if not whole_layer(layer).removed <= mask.removed}
        return mask


class OracleBaseline(Baseline):
    """Finds the mask of lowest NLL under which the request fits by brute force.

    Masks that remove more than necessary are tried too, since a removal may lower the NLL.
    As with every baseline nothing is removed where the dense model fits. Requests share the
    stored scores: with 12 blocks at most 4,096 masks are ever run.

    Raises:
        SearchTooLargeError: The model has more than `MOST_BLOCKS` blocks.
    """

    name = "oracle"

    def __init__(self, context: PruningContext, seed: int = 0) -> None:
        super().__init__(context, seed)
        blocks = self.memory.facts.num_blocks
        if blocks > MOST_BLOCKS:
            raise SearchTooLargeError(
                f"The baseline 'oracle' scores every mask, but {self.memory.facts.name} has "
                f"{blocks} blocks and so 2^{blocks} masks. Use a model of at most {MOST_BLOCKS} "
                "blocks, or another baseline such as 'evolutionary'."
            )
        self._masks = list(every_mask(blocks))

    def _choose(self, request: Request, scores: CountingScorer) -> Plan:
        if fits(self.memory, Plan(), request):
            return Plan()
        return scores.best([mask for mask in self._masks if fits(self.memory, mask, request)])


def whole_layer(layer: int) -> Plan:
    """Return the mask that removes both blocks of a layer."""
    return Plan.removing(2 * layer, 2 * layer + 1)
