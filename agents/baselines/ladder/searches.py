"""Searches that measure plans for each request: greedy per byte, and beam search."""

from __future__ import annotations

from typing import TYPE_CHECKING

from agents.baselines.base import CountingScorer, price_per_byte
from agents.baselines.ladder.base import Candidate, LadderBaseline, Positions, Steps, price
from rap_env.ladder.item_bytes import LadderBytes
from rap_env.ladder.state import LadderState
from rap_env.plan import Plan
from rap_env.request import Request

if TYPE_CHECKING:
    from rap_env.context.base import PruningContext

_LAZY_BATCH = 6
_CHILDREN = 3  # of each plan of a beam, times its width


class LadderGreedyBaseline(LadderBaseline):
    """Repeatedly takes the step with the lowest measured rise in NLL per useful byte.

    Bytes are those of the request's own shape, and bytes beyond what it still needs do not count.
    In each round the most promising steps are measured, a few at a time, until the best of them
    is no worse than the last known price of the next one (Minoux 1978). A step that was not
    measured yet is expected to cost its one-shot cost.
    """

    name = "greedy_per_byte"
    exact = False

    def __init__(self, context: PruningContext, item_bytes: LadderBytes, seed: int = 0) -> None:
        super().__init__(context, item_bytes, seed)
        self._context = context
        self.setup_evaluations = context.level_costs(self.ladder.cache_levels).evaluations

    def _choose(self, request: Request, scores: CountingScorer) -> Plan:
        costs = self.costs(request)
        if costs.dense_peak_bytes <= request.budget_bytes:
            return Plan()
        steps = Steps(self._context, costs)
        state, nll = steps.state(), scores.nll(Plan())
        while state.peak_bytes > request.budget_bytes:
            best, nll = self._next(steps, state, scores, nll, request.budget_bytes)
            state.lower(best.step[0])
        return self.ladder.plan(state.positions)

    def _next(
        self,
        steps: Steps,
        state: LadderState,
        scores: CountingScorer,
        nll: float,
        budget_bytes: int,
    ) -> tuple[Candidate, float]:
        """Return the step with the lowest measured price, and the NLL after it."""
        needed = state.peak_bytes - budget_bytes
        waiting = steps.candidates(state)
        waiting.sort(key=lambda one: price(one, one.rise, needed))
        batch = len(waiting) if self.exact else _LAZY_BATCH
        measured: dict[Candidate, float] = {}

        def measured_price(one: Candidate) -> tuple[float, int, Positions]:
            return price(one, measured[one] - nll, needed)

        while waiting:
            tried, waiting = waiting[:batch], waiting[batch:]
            measured |= steps.measure(scores, nll, tried)
            best = min(measured, key=measured_price)
            if waiting and measured_price(best) <= price(waiting[0], waiting[0].rise, needed):
                break
        return best, measured[best]


class ExactLadderGreedyBaseline(LadderGreedyBaseline):
    """As `LadderGreedyBaseline`, but every step is measured in each round."""

    name = "greedy_per_byte-exact"
    exact = True


class LadderBeamBaseline(LadderBaseline):
    """Beam search over plans by the rise in NLL per useful byte that they free.

    As the search over masks, but of each plan of the beam only the most promising steps are
    measured, three times the width: those with the lowest expected price of the whole plan.

    Args:
        context: Memory model, scorer and level costs.
        item_bytes: The ladder with its bytes.
        seed: Unused; the search is deterministic.
        width: Plans in the beam, at least 1.
    """

    name = "beam"

    def __init__(
        self, context: PruningContext, item_bytes: LadderBytes, seed: int = 0, width: int = 4
    ) -> None:
        super().__init__(context, item_bytes, seed)
        self._context = context
        self.width = width
        self.setup_evaluations = context.level_costs(self.ladder.cache_levels).evaluations

    def _choose(self, request: Request, scores: CountingScorer) -> Plan:
        costs, budget = self.costs(request), request.budget_bytes
        if costs.dense_peak_bytes <= budget:
            return Plan()
        steps = Steps(self._context, costs)
        native_bytes, native_nll = costs.dense_peak_bytes, scores.nll(Plan())

        def total_price(peak_bytes: int, nll: float) -> float:
            useful = min(native_bytes - peak_bytes, native_bytes - budget)
            return price_per_byte(nll - native_nll, useful)

        native: Positions = tuple(steps.state().positions)
        beam, peaks, nlls = [native], {native: native_bytes}, {native: native_nll}
        while unfit := [one for one in beam if peaks[one] > budget]:
            children: list[Positions] = []
            for plan in unfit:
                found = steps.candidates(steps.state(plan))
                for child in found:
                    peaks[child.positions] = steps.state(child.positions).peak_bytes
                expected = {c: total_price(peaks[c.positions], nlls[plan] + c.rise) for c in found}
                tried = sorted(found, key=expected.__getitem__)[: _CHILDREN * self.width]
                measured = steps.measure(scores, nlls[plan], tried)
                nlls |= {child.positions: nll for child, nll in measured.items()}
                children += [child.positions for child in tried]
            plans = dict.fromkeys([*(one for one in beam if one not in unfit), *children])
            beam = sorted(plans, key=lambda one: total_price(peaks[one], nlls[one]))[: self.width]
        ended = [one for one in nlls if peaks[one] <= budget]
        best, _ = min(((one, nlls[one]) for one in ended), key=lambda pair: pair[1])
        return self.ladder.plan(best)
