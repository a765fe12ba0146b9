"""Searches for the best known plans: a predictor proposes plans, the model measures them.

1. Measure the native model, every single removal, and the plans of the greedy order for some
   requests; before them, if there is a table of the same model on other text, its best plans.
2. In rounds: fit an ensemble of predictors to all scores so far; for each of some requests,
   improve some of the best known plans by changes at equal bytes, as the ensemble sees it;
   measure the plans with the greatest expected gain.

The ensemble is pessimistic, because a search finds the errors of a predictor: with the mean
of five predictors, plans that were expected to lose 1.3 nats lost 2.5; with two standard
deviations added, the first proposal was better than the best of 2,500 known plans. Rounds
differ in their pessimism. The search is deterministic given the scores, so an interrupted
search is repeated from the store.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from rap_env.importance.level_costs import LevelCosts
from rap_env.importance.orders import greedy_order, one_shot_costs
from rap_env.importance.plan_table import KnownPlans, PlanTable
from rap_env.ladder.items import Counts, Ladder
from rap_env.ladder.ladder_bytes import LadderBytes
from rap_env.ladder.state import LadderCosts
from rap_env.plan import Plan
from rap_env.request import Request
from rap_env.scoring.interface import OnScore
from rap_env.scoring.predictor import Floats, PlanFeatures, ScoreModel
from rap_env.scoring.predictor_fit import fit_scores, necessary_plans
from rap_env.specs import check, setting

if TYPE_CHECKING:  # a search with a predictor loads no torch
    from rap_env.scoring.scorer import PlanScorer

_MOST_STEPS = 40
_PESSIMISM = (1.0, 2.0, 4.0)  # of the rounds, in turn
_STARTS = 3  # known plans that are improved for a request, the best one included
_NEAR = 40  # they are drawn from so many of the best that fit
_GAIN_FLOOR = 0.02  # added to a ΔNLL before a gain is divided by it, nats per token


@dataclass(frozen=True)
class PlanSearchConfig:
    """Settings of the search for the best plans.

    Attributes:
        evaluations: Most plans to score, known ones included; the model's blocks need one
            each in any case.
        deepest_loss: Plans with a greater ΔNLL are not searched for, nats per token.
        batch: Plans to measure between two fits of the predictors.
        requests: Requests for which plans are proposed in a round.
        members: Predictors of the ensemble.
        seed: Seed of the requests of a round and of the predictors.

    Raises:
        InvalidRequestError: A number is out of range.
    """

    evaluations: int = setting(3000, low=1)
    deepest_loss: float = setting(3.0, above=0)
    batch: int = setting(32, low=1)
    requests: int = setting(128, low=1)
    members: int = setting(5, low=1)
    seed: int = 0

    def __post_init__(self) -> None:
        check(self)


def build_plan_table(
    scorer: PlanScorer,
    costs: LevelCosts,
    ladder_bytes: LadderBytes,
    requests: Sequence[Request],
    config: PlanSearchConfig = PlanSearchConfig(),
    known: Mapping[Plan, float] | None = None,
    on_score: OnScore | None = None,
    start: PlanTable | None = None,
) -> PlanTable:
    """Search the best plans of a ladder on the scorer's text for requests like some given ones.

    Args:
        scorer: Measures plans.
        costs: One-shot costs of the ladder's levels.
        ladder_bytes: The ladder and its bytes.
        requests: A sample of the expected requests.
        config: Settings.
        known: NLL of plans that were measured before on the same text, nats per token; those
            with levels of the ladder become part of the result.
        on_score: Called after each plan that is measured.
        start: A table of the same model on other text. For each request, the
            best of its plans that fits is measured first.
    """
    began, ran = time.perf_counter(), scorer.evaluations
    search = _Search(scorer, costs, ladder_bytes, requests, config, known or {}, on_score)
    for plans in search.rounds(start):
        search.measure(plans[: max(0, config.evaluations - len(search.nll))])
        if len(search.nll) >= config.evaluations:
            break
    return PlanTable(
        num_layers=ladder_bytes.memory.facts.num_layers,
        dense_nll=search.native_nll,
        scores=search.nll,
        evaluations_run=scorer.evaluations - ran,
        seconds=time.perf_counter() - began,
        settings={**asdict(config), "sample": len(requests)},
        provenance=scorer.provenance,
    )


class _Search:
    def __init__(
        self,
        scorer: PlanScorer,
        costs: LevelCosts,
        ladder_bytes: LadderBytes,
        requests: Sequence[Request],
        config: PlanSearchConfig,
        known: Mapping[Plan, float],
        on_score: OnScore | None,
    ) -> None:
        self._scorer, self._config, self._on_score = scorer, config, on_score
        self._costs, self._bytes, self._requests = costs, ladder_bytes, requests
        self._order = greedy_order(costs, ladder_bytes)
        self._ladder = ladder_bytes.ladder
        self._rng = np.random.default_rng(config.seed)
        self.nll = {plan: nll for plan, nll in known.items() if self._ladder.has(plan)}
        self.measure(necessary_plans(ladder_bytes.memory.facts.num_blocks))
        self.native_nll = self.nll[Plan()]

    def measure(self, plans: Sequence[Plan]) -> None:
        """Score plans that are not known yet."""
        new = [plan for plan in plans if plan not in self.nll]
        if new:
            nll = self._scorer.nll_many(new, self._on_score)
            self.nll |= dict(zip(new, nll, strict=True))

    def rounds(self, start: PlanTable | None) -> Iterator[list[Plan]]:
        """Plans to measure: of another table, of the greedy order, then proposals."""
        if start is not None:
            yield self._best_of(start.on(self._ladder))
        first = dict.fromkeys(self._greedy(request) for request in self._requests)
        yield list(first)[: self._config.batch]
        number, idle = 0, 0
        while idle < len(_PESSIMISM):
            predictor = fit_plan_predictor(
                self.nll,
                self._costs,
                self._ladder,
                members=self._config.members,
                pessimism=_PESSIMISM[number % len(_PESSIMISM)],
                seed=self._config.seed,
            )
            plans = self._proposals(predictor)
            number, idle = number + 1, 0 if plans else idle + 1
            if plans:
                yield plans

    def _best_of(self, known: KnownPlans) -> list[Plan]:
        """For each request, the best of some plans that fits, without repetitions."""
        best = (
            known.best(self._bytes.costs(r.batch_size, r.seq_len_tokens), r.budget_bytes)
            for r in self._requests
        )
        return list(dict.fromkeys(plan for plan in best if plan is not None))

    def _proposals(self, predictor: PlanPredictor) -> list[Plan]:
        """Unmeasured plans that are expected to be better than the best known ones."""
        known = KnownPlans.of(self._ladder, self.nll, self.native_nll)
        gains: dict[Plan, float] = {}
        count = min(self._config.requests, len(self._requests))
        for number in self._rng.choice(len(self._requests), size=count, replace=False):
            request = self._requests[number]
            costs = self._bytes.costs(request.batch_size, request.seq_len_tokens)
            fitting = np.flatnonzero(known.peak_bytes(costs) <= request.budget_bytes)[:_NEAR]
            best = known.delta_nll[fitting].min(initial=np.inf)
            chosen = [*fitting[:1], *self._rng.permutation(fitting[1:])[: _STARTS - 1]]
            greedy = self._ladder.positions(self._greedy(request))
            search = PlanSearch(predictor, costs, request.budget_bytes)
            for start in (np.array(greedy), *known.positions[chosen]):
                positions, expected = search.improve(start)
                if expected > self._config.deepest_loss:
                    continue
                proposal = self._ladder.plan(positions.tolist())
                gain = (min(best, 1e3) - expected) / (max(expected, 0.0) + _GAIN_FLOOR)
                if proposal not in self.nll and gain > 0:
                    gains[proposal] = max(gain, gains.get(proposal, 0.0))
        return sorted(gains, key=lambda plan: -gains[plan])[: self._config.batch]

    def _greedy(self, request: Request) -> Plan:
        costs = self._bytes.costs(request.batch_size, request.seq_len_tokens)
        return costs.lower_until_fits(self._order.steps, request.budget_bytes)


def lowered_plans(costs: LadderCosts, positions: Counts) -> tuple[Counts, Counts, Counts]:
    """All plans one action below some plans of a ladder under one request.

    Args:
        costs: The bytes of the request.
        positions: The positions of the plans' levels, (n, items).

    Returns:
        Those of the lower plans, (m, items), and for each the number of the plan that it
        comes from and the item that was lowered, (m,) each.
    """
    stacked, caches = costs.stacked, list(costs.ladder.caches)
    nexts = stacked.nexts(positions)
    lowerable = nexts >= 0
    for position in costs.ladder.shared_positions:  # such caches give the same plan
        alike = nexts[:, caches] == position
        lowerable[:, caches] &= ~alike | (alike.cumsum(axis=1) == 1)
    parents, items = np.nonzero(lowerable)
    return stacked.lowered(positions[parents], items), parents, items


def fit_plan_predictor(
    scores: Mapping[Plan, float],
    costs: LevelCosts,
    ladder: Ladder,
    *,
    members: int = 5,
    pessimism: float = 0.0,
    seed: int = 0,
) -> PlanPredictor:
    """Fit predictors to measured plans, as `fit_scores` does.

    Args:
        scores: NLL of plans, nats per token, with the native model and every single
            removal.
        costs: One-shot costs of the ladder's levels.
        ladder: The items.
        members: Predictors of the ensemble.
        pessimism: As in `ScoreModel`.
        seed: Seed of the fit.
    """
    model, _ = fit_scores(
        scores,
        2 * costs.num_layers,
        costs.delta_nll,
        members=members,
        pessimism=pessimism,
        seed=seed,
    )
    return PlanPredictor(ladder, one_shot_costs(costs, ladder), model)


class PlanPredictor:
    """Predicts ΔNLL of the plans of a ladder, as arrays of positions.

    Args:
        ladder: The items.
        one_shot: ΔNLL if only this item has this level, nats per token, (items, W).
        model: Predicts from removed blocks and from what other levels cost.
    """

    def __init__(self, ladder: Ladder, one_shot: Floats, model: ScoreModel) -> None:
        self.ladder, self.model = ladder, model
        self._features = PlanFeatures(ladder, one_shot, len(model.members[0].alone))

    def delta_nll(self, positions: Counts) -> Floats:
        """Predicted ΔNLL of plans (n, items), nats per token, (n,)."""
        lowered, removed = self._features.lowered(positions), self._features.removed(positions)
        return self.model.delta_nll_many(removed, lowered, clamped=False)

    def delta_nll_below(
        self, positions: Counts, children: Counts, parents: Counts, items: Counts
    ) -> Floats:
        """As `delta_nll` for plans one action below others, in a fraction of the time.

        Args:
            positions: The others, (m, items).
            children: The plans, (n, items).
            parents: The row of the plan that each was made from, (n,).
            items: The item that was lowered, (n,).
        """
        features, reached = self._features, children[np.arange(len(children)), items]
        removed, lowered = features.block_removed(items, reached), features.lowered(children)
        return self.model.delta_nll_below(features.removed(positions), parents, removed, lowered)


class PlanSearch:
    """Improves plans at equal bytes by a predictor.

    Args:
        predictor: Predicts ΔNLL.
        costs: The bytes of the request.
        budget_bytes: Its budget.
    """

    def __init__(self, predictor: PlanPredictor, costs: LadderCosts, budget_bytes: int) -> None:
        self._predictor, self._costs, self._budget = predictor, costs, budget_bytes

    def improve(self, positions: Counts) -> tuple[Counts, float]:
        """Raise one item and lower others until the request fits, as long as that helps.

        Args:
            positions: The plan to begin with, (items,); if it does not fit, it is lowered
                first.

        Returns:
            The positions of the best plan found, and its predicted ΔNLL, nats per token,
            which is infinite if no plan was found that fits.
        """
        plans, values = self.refill(positions[None])
        best, value = plans[0], float(values[0])
        for _ in range(_MOST_STEPS):
            raised = self._raised(best.tolist())
            if not raised:
                break
            plans, values = self.refill(np.array(raised))
            least = int(values.argmin())
            if values[least] >= value - 1e-9:
                break
            best, value = plans[least], float(values[least])
        return best, value

    def _raised(self, positions: list[int]) -> list[list[int]]:
        """The plans with one item of a plan at a higher level, without repetitions."""
        raised = (self._costs.steps.raised(positions, item) for item in range(len(positions)))
        return [list(plan) for plan in dict.fromkeys(tuple(p) for p in raised if p is not None)]

    def refill(self, positions: Counts) -> tuple[Counts, Floats]:
        """Lower plans by the least predicted rise per useful byte until they fit.

        Args:
            positions: The plans, (n, items).

        Returns:
            The lowered plans, (n, items), and their predicted ΔNLL, nats per token, (n,),
            which is infinite where no action is left and the plan does not fit.
        """
        lowered = positions.copy()
        values, peaks = self._predictor.delta_nll(lowered), self._costs.peaks(lowered)
        for _ in range(len(self._costs.ladder) * self._costs.ladder.width):
            open_rows = np.flatnonzero(peaks > self._budget)
            if not len(open_rows):
                break
            unfit = lowered[open_rows]
            children, parents, items = lowered_plans(self._costs, unfit)
            if not len(children):
                break
            before, child_peaks = open_rows[parents], self._costs.peaks(children)
            reached = self._predictor.delta_nll_below(unfit, children, parents, items)
            freed = peaks[before] - child_peaks
            useful = np.minimum(freed, peaks[before] - self._budget)
            rise = np.maximum(reached - values[before], 0.0)
            price = np.where(useful > 0, rise / np.maximum(useful, 1), np.inf)
            order = np.lexsort((price, before))
            rows, first = np.unique(before[order], return_index=True)
            chosen = order[first]
            lowered[rows], values[rows] = children[chosen], reached[chosen]
            peaks[rows] = child_peaks[chosen]
        return lowered, np.where(peaks <= self._budget, values, np.inf)
