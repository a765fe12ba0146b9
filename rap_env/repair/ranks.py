"""Which stub gets how much rank, at equal bytes."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence


def allocate(
    losses: Mapping[int, Sequence[float]], choices: Sequence[int], total: int
) -> dict[int, int]:
    """Give ranks to blocks so that the sum of losses is small and the sum of ranks bounded.

    Every unit of rank takes the same bytes, so ranks are bytes. Starting from the least rank, the
    step that saves most per unit is taken first; where returns diminish, as they do for
    regressions, nothing of the same sum is better but for the last step.

    Args:
        losses: For each block: the loss of each of the `choices`.
        choices: Ranks to choose from, ascending.
        total: Most that the ranks may sum up to.

    Returns:
        Rank of each block.
    """
    place = dict.fromkeys(losses, 0)
    left = total - choices[0] * len(losses)
    waiting: list[tuple[float, int, int]] = []

    def offer(block: int) -> None:
        """The further choice that saves most per unit among those that fit, if any saves."""
        at, curve = place[block], losses[block]
        gains = [
            ((curve[at] - curve[to]) / (choices[to] - choices[at]), to)
            for to in range(at + 1, len(choices))
            if choices[to] - choices[at] <= left
        ]
        best = max(gains, default=(0.0, at))
        if best[0] > 0:
            heapq.heappush(waiting, (-best[0], block, best[1]))

    for block in losses:
        offer(block)
    while waiting:
        _, block, to = heapq.heappop(waiting)
        cost = choices[to] - choices[place[block]]
        if cost <= left:
            left -= cost
            place[block] = to
        offer(block)
    return {block: choices[at] for block, at in place.items()}
