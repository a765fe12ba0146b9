"""The base of methods that choose plans over a ladder, and the steps that searches try."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from agents.baselines.base import AnyBaseline, CountingScorer, price_per_byte
from rap_env.importance.orders import one_shot_costs
from rap_env.ladder.item_bytes import LadderBytes
from rap_env.ladder.state import LadderCosts, LadderState
from rap_env.plan import Plan
from rap_env.request import Request

if TYPE_CHECKING:
    from rap_env.context.base import PruningContext

Positions = tuple[int, ...]
"""The position of each item's level in its levels, (items,); see `Ladder.positions`."""


class LadderBaseline(AnyBaseline[Plan]):
    """Chooses a plan without learning.

    A baseline lowers items until the request's peak bytes are within the budget. Only ``dense``
    and ``rap-v0`` may fail to reach it.

    Args:
        context: Memory model, scorer and importance of the model.
        item_bytes: The ladder with its bytes.
        seed: Seed of everything random in the baseline.
    """

    def __init__(self, context: PruningContext, item_bytes: LadderBytes, seed: int = 0) -> None:
        super().__init__(context, seed)
        self.item_bytes = item_bytes
        self.ladder = item_bytes.ladder

    def costs(self, request: Request) -> LadderCosts:
        """The bytes of each item at each level for a request."""
        return self.item_bytes.costs(request.batch_size, request.seq_len_tokens)

    def _check_feasible(self, request: Request) -> None:
        self.item_bytes.check_feasible(request)

    def _native_fits(self, request: Request) -> bool:
        return self.costs(request).dense_peak_bytes <= request.budget_bytes


@dataclass(frozen=True)
class Candidate:
    """A step that a search may take: an item is lowered, with all that are taken with it.

    Attributes:
        positions: The positions of all levels after it.
        freed_bytes: Bytes that it frees, shared ones left out.
        rise: Last known ΔNLL of the step, nats per token: measured, or predicted.
        step: What identifies the step: the item, its level and that of its partner.
    """

    positions: Positions
    freed_bytes: int
    rise: float
    step: tuple[int, int, int]


class Steps:
    """The steps of one search, with what is known of their ΔNLL.

    Args:
        context: Gives the one-shot costs, which predict steps that were not measured yet.
        costs: Bytes for the request.

    Attributes:
        ladder: The items.
    """

    def __init__(self, context: PruningContext, costs: LadderCosts) -> None:
        self.ladder, self._costs = costs.ladder, costs
        known = context.level_costs(self.ladder.cache_levels)
        self._one_shot: list[list[float]] = one_shot_costs(known, self.ladder).tolist()
        self._measured: dict[tuple[int, int, int], float] = {}

    def state(self, positions: Positions | None = None) -> LadderState:
        """A state of the bytes that starts with some levels, by default native ones."""
        return self._costs.state(positions)

    def candidates(self, state: LadderState) -> list[Candidate]:
        """The steps that free bytes; all steps if none does. Levels taken together are one step."""
        found = []
        for item in filter(state.is_valid, range(len(self.ladder))):
            takers = state.companions(item)
            if takers[0] != item:
                continue
            step = self._step(state, item)
            predicted = sum(self._predicted(state, taker) for taker in takers)
            found.append(
                Candidate(
                    tuple(state.positions_after(item)),
                    sum(map(state.freed_bytes, takers)),
                    self._measured.get(step, predicted),
                    step,
                )
            )
        return [one for one in found if one.freed_bytes > 0] or found

    def measure(
        self, scores: CountingScorer, nll: float, tried: Sequence[Candidate]
    ) -> dict[Candidate, float]:
        """Measure candidates of a plan with a known NLL.

        Returns:
            The NLL after each of them, nats per token.
        """
        found = scores.nll_many([self.ladder.plan(one.positions) for one in tried])
        self._measured |= {one.step: value - nll for one, value in zip(tried, found, strict=True)}
        return dict(zip(tried, found, strict=True))

    def _step(self, state: LadderState, item: int) -> tuple[int, int, int]:
        partner = self.ladder.partners[item]
        return item, state.positions[item], state.positions[partner]

    def _predicted(self, state: LadderState, item: int) -> float:
        """Predicted ΔNLL of an item's next level, at least 0."""
        position, after = state.positions[item], state.positions_after(item)
        rise = self._one_shot[item][after[item]] - self._one_shot[item][position]
        partner = self.ladder.partners[item]
        if partner != item and after[item] == self.ladder.removals[item]:  # its cache goes too
            rise -= self._one_shot[partner][state.positions[partner]]
        return max(0.0, rise)


def price(candidate: Candidate, rise: float, needed_bytes: int) -> tuple[float, int, Positions]:
    """Nats per useful byte of a step, by which steps are sorted; ties prefer more bytes."""
    useful = min(candidate.freed_bytes, needed_bytes)
    return price_per_byte(rise, useful), -candidate.freed_bytes, candidate.positions


def raised(
    costs: LadderCosts, positions: Positions, order: Sequence[int], budget_bytes: int
) -> Positions:
    """Raise items, in `order`, to the highest level at which the request still fits.

    Bytes that items share may let an earlier item rise after a later one, so the order is
    repeated until no item can be raised.
    """
    before: Positions | None = None
    while positions != before:
        before = positions
        for item in order:
            higher = level_above(costs, positions, item)
            while higher is not None:
                if costs.state(higher).peak_bytes <= budget_bytes:
                    positions = higher
                higher = level_above(costs, higher, item)
    return positions


def level_above(costs: LadderCosts, positions: Positions, item: int) -> Positions | None:
    """The positions with one item at the level above its own; None if it is native or gone.

    An attention block that returns brings its cache back at the level that most caches have.
    """
    ladder, position = costs.ladder, positions[item]
    if position == 0 or position >= len(ladder.items[item].levels):
        return None
    nexts = costs.steps.nexts[item]
    above = min((n for n in range(position) if nexts[n] == position), default=position - 1)
    found = list(positions)
    found[item] = above
    partner = ladder.partners[item]
    if partner != item and position == ladder.removals[item]:
        gone = len(ladder.items[partner].levels)
        kept = [positions[cache] for cache in ladder.caches if positions[cache] < gone]
        found[partner] = max(set(kept), key=lambda p: (kept.count(p), -p), default=0)
    return tuple(found)
