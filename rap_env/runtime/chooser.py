"""A policy's mask, made to fit by a guard."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rap_env.blocks import BlockMask
from rap_env.runtime.demand import NOTHING, Demand
from rap_env.runtime.needs import Needs

if TYPE_CHECKING:
    from rap_env.policy import MaskPolicy

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
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


class Chooser:
    """Asks a policy, and makes its masks fit.

    Args:
        policy: The policy.
        needs: Counts what masks need.
        guard_order: See `RuntimeController`.

    Raises:
        UnknownNameError: The order names a block that the model does not have.
    """

    def __init__(
        self, policy: MaskPolicy, needs: Needs, guard_order: Sequence[int] | None = None
    ) -> None:
        self.policy = policy
        self._needs = needs
        if guard_order is None:
            guard_order = getattr(policy, "order", None)
        self._order = None if guard_order is None else tuple(guard_order)
        BlockMask.of(*(self._order or ())).check(needs.memory.facts.num_blocks)

    @property
    def guards(self) -> bool:
        """Whether blocks are removed beyond the policy's mask where it does not fit."""
        return self._order != ()

    def order(self, demand: Demand) -> Sequence[int]:
        """Indices of all blocks that the guard may remove, those to go first at the front."""
        if self._order is not None:
            return self._order
        freed = self._needs.freed_bytes(demand)
        return sorted(range(len(freed)), key=lambda index: -freed[index])

    def least(self, limit_bytes: int, demand: Demand = NOTHING) -> BlockMask:
        """The smallest mask there is: all that the guard removes, or what the policy says."""
        if self.guards:
            return BlockMask.of(*self.order(demand))
        return self._asked(demand, limit_bytes)

    def least_bytes(self, demand: Demand, limit_bytes: int) -> int:
        """What the smallest mask needs."""
        return self._needs.bytes(self.least(limit_bytes, demand), demand)

    def choose(self, demand: Demand, limit_bytes: int) -> tuple[Choice | None, bool]:
        """The policy's mask for a demand, made to fit.

        Args:
            demand: What is to be served.
            limit_bytes: What the mask may need.

        Returns:
            The choice, or None if no mask fits; and whether the policy was asked.
        """
        if self.guards and self.least_bytes(demand, limit_bytes) > limit_bytes:
            return None, False
        said = self._asked(demand, limit_bytes)
        choice = self.fitted(said, demand, limit_bytes)
        return None if choice is None else replace(choice, guarded=choice.mask != said), True

    def without_refill(
        self, choice: Choice, before: BlockMask, demand: Demand, limit_bytes: int
    ) -> Choice:
        """A choice without attention blocks that come back: each token so far would run again.

        The blocks stay removed, and of those that were to go instead, as many stay as fit.

        Args:
            choice: What was chosen.
            before: The mask of now.
            demand: What is served.
            limit_bytes: What the mask may need.
        """
        back = {index for index in (before - choice.mask).indices if index % 2 == 0}
        if not back:
            return choice
        mask = choice.mask | BlockMask(frozenset(back))
        for index in reversed(self.order(demand)):
            fewer = mask - BlockMask.of(index)
            if (
                index in mask
                and index not in before
                and (self._needs.bytes(fewer, demand) <= limit_bytes)
            ):
                mask = fewer
        return Choice(mask, self._needs.bytes(mask, demand), guarded=True)

    def fitted(self, mask: BlockMask, demand: Demand, limit_bytes: int) -> Choice | None:
        """A mask with more blocks removed by the guard until it fits; None if it never does."""
        fitted = self._needs.fitted(mask, self.order(demand), demand, limit_bytes)
        if fitted is None:
            return None
        return Choice(fitted, self._needs.bytes(fitted, demand), guarded=True)

    def _asked(self, demand: Demand, limit_bytes: int) -> BlockMask:
        """What the policy says; nothing removed, if it fails."""
        try:
            said = self.policy.choose(demand.request(limit_bytes))
            return said.check(self._needs.memory.facts.num_blocks)
        except Exception:
            log.exception("Policy %r failed; the guard chooses.", self.policy.name)
            return BlockMask()
