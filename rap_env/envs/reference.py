"""The masks that a reward can be relative to: what a named baseline removes for a request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from rap_env.blocks import BlockMask
from rap_env.errors import InvalidRequestError

if TYPE_CHECKING:
    from rap_env.context.base import PruningContext
    from rap_env.envs.task import Start

Reference = Callable[["Start"], BlockMask]
"""Gives a baseline's mask for the request that an episode begins with."""


def make_reference(name: str | None, context: PruningContext) -> Reference | None:
    """The baseline that a reward names, or None if it names none.

    Args:
        name: One of `rap_env.reward.COMPARED_TO`, or None.
        context: Has its order or frontier; measures it now if nobody did before.

    Raises:
        InvalidRequestError: ``"gsi"``, but the context is not to look at importance at all.
        RapError: As measuring or loading an order or a frontier does.
    """
    if name is None:
        return None
    if name == "frontier":
        return _from_frontier(context)
    if name == "one_shot":
        loss_rise = np.asarray(context.one_shot.loss_rise)
        return _from_order(np.argsort(loss_rise, kind="stable").tolist())
    if not context.features.gsi_rank.any():  # zeros: importance="none"
        raise InvalidRequestError(
            "A reward relative to 'gsi' needs the GSI order, but importance='none' leaves it out; "
            "use importance='gsi', or relative_to='one_shot'."
        )
    return _from_order(context.gsi.full_order)


def _from_order(order: Sequence[int]) -> Reference:
    return lambda start: start.costs.remove_until_fits(order, start.request.budget_bytes)


def _from_frontier(context: PruningContext) -> Reference:
    frontier = context.frontier

    def best(start: Start) -> BlockMask:
        found = frontier.best(context.memory, start.request)
        if found is None:
            raise InvalidRequestError(
                f"No mask of the frontier fits {start.request}, so a reward cannot be relative to "
                "it; build the frontier for smaller budgets too, or give the workload larger ones."
            )
        return found

    return best
