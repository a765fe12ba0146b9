"""The choice of a mask: the policy's mask, made to fit by a guard that removes more blocks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from rap_env.blocks import BlockMask
from rap_env.policy import MaskPolicy
from rap_env.runtime.batch_shape import EMPTY_BATCH, BatchShape
from rap_env.runtime.memory_estimator import MemoryEstimator

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MaskChoice:
    """A mask that fits.

    Attributes:
        mask: The mask.
        need_bytes: Bytes that it needs.
        guarded: Whether the guard changed the policy's mask.
        decision_s: Seconds that the choice took.
    """

    mask: BlockMask
    need_bytes: int
    guarded: bool
    decision_s: float = 0.0


class MaskChooser:
    """Asks a policy for masks, and lets the guard make them fit.

    Args:
        policy: The policy.
        estimator: Predicts the bytes of masks.
        guard_order: See `RuntimeController`.

    Raises:
        UnknownNameError: The order names a block that the model does not have.
    """

    def __init__(
        self,
        policy: MaskPolicy,
        estimator: MemoryEstimator,
        guard_order: Sequence[int] | None = None,
    ) -> None:
        self.policy = policy
        self._estimator = estimator
        if guard_order is None:
            guard_order = getattr(policy, "order", None)
        self._order = None if guard_order is None else tuple(guard_order)
        self._guards = self._order != ()
        BlockMask.of(*(self._order or ())).check(estimator.memory.facts.num_blocks)

    def order(self, shape: BatchShape) -> Sequence[int]:
        """Indices of the blocks that the guard may remove, in the order of removal."""
        if self._order is not None:
            return self._order
        freed = self._estimator.freed_bytes(shape)
        return sorted(range(len(freed)), key=lambda index: -freed[index])

    def smallest(self, limit_bytes: int, shape: BatchShape = EMPTY_BATCH) -> BlockMask:
        """The mask that leaves least: all that the guard may remove, or the policy's mask."""
        if self._guards:
            return BlockMask.of(*self.order(shape))
        return self._ask_policy(shape, limit_bytes)

    def smallest_bytes(self, shape: BatchShape, limit_bytes: int) -> int:
        """Bytes that the smallest mask needs."""
        return self._estimator.peak_bytes(self.smallest(limit_bytes, shape), shape)

    def choose(self, shape: BatchShape, limit_bytes: int) -> tuple[MaskChoice | None, bool]:
        """Choose a mask for a batch: the policy's, made to fit.

        Args:
            shape: The batch to serve.
            limit_bytes: Most bytes that the mask may need.

        Returns:
            The choice, or None if no mask fits; and whether the policy was asked.
        """
        if self._guards and self.smallest_bytes(shape, limit_bytes) > limit_bytes:
            return None, False
        wanted = self._ask_policy(shape, limit_bytes)
        mask = self._estimator.shrink_to_fit(wanted, self.order(shape), shape, limit_bytes)
        if mask is None:
            return None, True
        return MaskChoice(mask, self._estimator.peak_bytes(mask, shape), mask != wanted), True

    def without_refill(
        self, choice: MaskChoice, before: BlockMask, shape: BatchShape, limit_bytes: int
    ) -> MaskChoice:
        """Change a choice so that no attention block returns, which would refill its cache.

        Those blocks stay removed. In exchange, as many of the newly removed blocks stay as fit.

        Args:
            choice: The choice.
            before: The mask applied now.
            shape: The batch that is served.
            limit_bytes: Most bytes that the mask may need.
        """
        returning = {index for index in (before - choice.mask).indices if index % 2 == 0}
        if not returning:
            return choice
        mask = choice.mask | BlockMask(frozenset(returning))
        for index in reversed(self.order(shape)):
            if index not in mask or index in before:
                continue
            fewer = mask - BlockMask.of(index)
            if self._estimator.peak_bytes(fewer, shape) <= limit_bytes:
                mask = fewer
        return MaskChoice(mask, self._estimator.peak_bytes(mask, shape), guarded=True)

    def _ask_policy(self, shape: BatchShape, limit_bytes: int) -> BlockMask:
        """The policy's mask; the dense one if the policy fails."""
        try:
            mask = self.policy.choose(shape.request(limit_bytes))
            return mask.check(self._estimator.memory.facts.num_blocks)
        except Exception:
            log.exception("Policy %r failed; the guard chooses the mask.", self.policy.name)
            return BlockMask()
