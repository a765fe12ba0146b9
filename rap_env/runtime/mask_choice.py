"""A policy's mask, made to fit by a guard."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rap_env.blocks import BlockMask
from rap_env.runtime.batch_shape import EMPTY_BATCH, BatchShape
from rap_env.runtime.memory_estimator import MemoryEstimator

if TYPE_CHECKING:
    from rap_env.policy import MaskPolicy

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MaskChoice:
    """A mask that fits.

    Attributes:
        mask: The mask.
        need_bytes: What it needs.
        guarded: Whether it is the guard's, and not what the policy said.
        decision_s: Seconds that the choice took.
    """

    mask: BlockMask
    need_bytes: int
    guarded: bool
    decision_s: float = 0.0


class MaskChooser:
    """Asks a policy, and makes its masks fit.

    Args:
        policy: The policy.
        estimator: Counts what masks need.
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
        BlockMask.of(*(self._order or ())).check(estimator.memory.facts.num_blocks)

    @property
    def guards(self) -> bool:
        """Whether blocks are removed beyond the policy's mask where it does not fit."""
        return self._order != ()

    def order(self, shape: BatchShape) -> Sequence[int]:
        """Indices of all blocks that the guard may remove, those to go first at the front."""
        if self._order is not None:
            return self._order
        freed = self._estimator.freed_bytes(shape)
        return sorted(range(len(freed)), key=lambda index: -freed[index])

    def least(self, limit_bytes: int, shape: BatchShape = EMPTY_BATCH) -> BlockMask:
        """The smallest mask there is: all that the guard removes, or what the policy says."""
        if self.guards:
            return BlockMask.of(*self.order(shape))
        return self._asked(shape, limit_bytes)

    def least_bytes(self, shape: BatchShape, limit_bytes: int) -> int:
        """What the smallest mask needs."""
        return self._estimator.peak_bytes(self.least(limit_bytes, shape), shape)

    def choose(self, shape: BatchShape, limit_bytes: int) -> tuple[MaskChoice | None, bool]:
        """The policy's mask for a shape, made to fit.

        Args:
            shape: What is to be served.
            limit_bytes: What the mask may need.

        Returns:
            The choice, or None if no mask fits; and whether the policy was asked.
        """
        if self.guards and self.least_bytes(shape, limit_bytes) > limit_bytes:
            return None, False
        said = self._asked(shape, limit_bytes)
        choice = self.fitted(said, shape, limit_bytes)
        return None if choice is None else replace(choice, guarded=choice.mask != said), True

    def without_refill(
        self, choice: MaskChoice, before: BlockMask, shape: BatchShape, limit_bytes: int
    ) -> MaskChoice:
        """A choice without attention blocks that come back: each token so far would run again.

        The blocks stay removed, and of those that were to go instead, as many stay as fit.

        Args:
            choice: What was chosen.
            before: The mask of now.
            shape: What is served.
            limit_bytes: What the mask may need.
        """
        back = {index for index in (before - choice.mask).indices if index % 2 == 0}
        if not back:
            return choice
        mask = choice.mask | BlockMask(frozenset(back))
        for index in reversed(self.order(shape)):
            fewer = mask - BlockMask.of(index)
            if (
                index in mask
                and index not in before
                and (self._estimator.peak_bytes(fewer, shape) <= limit_bytes)
            ):
                mask = fewer
        return MaskChoice(mask, self._estimator.peak_bytes(mask, shape), guarded=True)

    def fitted(self, mask: BlockMask, shape: BatchShape, limit_bytes: int) -> MaskChoice | None:
        """A mask with more blocks removed by the guard until it fits; None if it never does."""
        fitted = self._estimator.fitted(mask, self.order(shape), shape, limit_bytes)
        if fitted is None:
            return None
        return MaskChoice(fitted, self._estimator.peak_bytes(fitted, shape), guarded=True)

    def _asked(self, shape: BatchShape, limit_bytes: int) -> BlockMask:
        """What the policy says; nothing removed, if it fails."""
        try:
            said = self.policy.choose(shape.request(limit_bytes))
            return said.check(self._estimator.memory.facts.num_blocks)
        except Exception:
            log.exception("Policy %r failed; the guard chooses.", self.policy.name)
            return BlockMask()
