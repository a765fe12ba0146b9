"""Finds the best of several plans exactly, without running each on the whole text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from rap_env.plan import Plan
from rap_env.scoring.interface import OnScore, notify
from rap_env.scoring.nll import VocabularyBound, window_nll
from rap_env.scoring.plan_runner import Node, as_one_batch, chunks, shared_plan
from rap_env.scoring.scorer import MaskScorer


class BestPlan(NamedTuple):
    """Result of an exact search, nats per token.

    Attributes:
        nll: NLL of every plan that was measured on the whole text, the best one included.
        lower_bounds: For the other plans, a lower bound of their NLL (up to rounding).
    """

    nll: dict[Plan, float]
    lower_bounds: dict[Plan, float]


def find_best_plan(
    scorer: MaskScorer,
    plans: Sequence[Plan],
    *,
    near: Plan | None = None,
    on_score: OnScore | None = None,
) -> BestPlan:
    """Find the plan of the least NLL exactly; drops each plan as soon as it cannot be the best.

    The NLL of a text is a sum of non-negative terms, so the terms of a part of the text bound the
    sum from below. For the part that was run, the NLL over a subset of the vocabulary is another
    lower bound (`VocabularyBound`), so few plans need the whole head.

    Args:
        scorer: Measures the plans; it caches the score of every plan measured to the end.
        plans: At least one; likely winners first.
        near: A plan whose likely words bound the NLL of the others: the more similar, the tighter.
            It costs as much as measuring one plan. None uses no such bound, which is better for a
            few plans of nearly equal NLL. Without effect unless all have the same level of the
            embeddings.
        on_score: Called after each plan that was measured or dropped.

    Raises:
        NonFiniteScoreError: The model gave NaN or infinity.
    """
    if scorer.llm.spare_bytes is not None:
        # The memory cap leaves no room for the vocabulary bound and the kept states.
        return BestPlan(dict(zip(plans, scorer.nll_many(plans, on_score), strict=True)), {})
    known = {p: float(v.mean()) for p in plans if (v := scorer.look_up(p)) is not None}
    missing = [plan for plan in plans if plan not in known]
    lower_bounds: dict[Plan, float] = {}
    if scorer.workers is not None and len(missing) > 1:
        job = replace(scorer.job, search=True, near=near)
        # A lower bound above the best of a part is above the best of all.
        for part in scorer.workers.measure(job, missing):
            scorer.take(part)
            known |= {plan: float(values.mean()) for plan, values in part.window_nll.items()}
            lower_bounds |= part.lower_bounds
            notify(on_score, part.plans)
    elif missing:
        with scorer.llm.masked(Plan()):
            search = _Search(scorer, plans, known)
            if near is not None and len({plan.embeddings for plan in (near, *plans)}) == 1:
                search.bound_by(near)
            for group in chunks(missing, search.in_flight):
                lower_bounds |= search.evaluate(group)
                notify(on_score, group)
            search.keep_winner()
    return BestPlan(known, lower_bounds)


@dataclass
class Candidate:
    """A plan that runs through a text batch by batch.

    Attributes:
        plan: The plan.
        hidden: Decoder output for each batch that was run but not measured yet, (windows, T, H).
        contributions: For each batch, its share of the text's NLL, or a lower bound of it.
        window_nll: For each batch that was measured exactly, the NLL of its windows.
        states: Hidden states at the nodes on its path, kept while it may still win.
    """

    plan: Plan
    hidden: dict[int, torch.Tensor] = field(default_factory=dict)
    contributions: dict[int, float] = field(default_factory=dict)
    window_nll: dict[int, torch.Tensor] = field(default_factory=dict)
    states: dict[tuple[int, Node], torch.Tensor] = field(default_factory=dict, repr=False)

    @property
    def nll(self) -> float:
        """Sum of the contributions so far, nats per token of the whole text."""
        return sum(self.contributions.values())


class _Search:
    """One exact search: runs candidates and tracks the best one so far.

    The states of the prefix that all plans share (`shared_plan`), such as that of one GSI round,
    are cached for all of them. The states of a single one are kept until it is known whether it
    wins, because the next round starts from them.
    """

    def __init__(self, scorer: MaskScorer, plans: Sequence[Plan], known: dict[Plan, float]) -> None:
        self._scorer = scorer
        self._shared = shared_plan(plans)
        self._known = known  # NLL of the plans measured to the end; grows
        self._best = min(known.values(), default=math.inf)
        self._winner: Candidate | None = None
        self._bound: VocabularyBound | None = None
        self._tolerance = 0.0
        self.in_flight = scorer.in_flight
        """Plans of one group, which advance together."""

    def bound_by(self, near: Plan) -> None:
        """Bound the NLL of plans from below by the entries that are likely under `near`.

        Candidates then keep the decoder's output for the whole text; what those of one group keep
        stays within the bytes of the cache.
        """
        scorer, candidate = self._scorer, Candidate(near)
        for batch in range(len(scorer.batches)):
            self._run([candidate], batch, shared=near)
        hidden = [candidate.hidden[batch] for batch in range(len(scorer.batches))]
        with scorer.runner.partial.embeddings(near.embeddings):
            self._bound = VocabularyBound(scorer.runner.partial, hidden, scorer.batches)
        self._tolerance = self._bound.tolerance
        facts, tokens = scorer.llm.facts, scorer.corpus.tokens.numel()
        text_bytes = tokens * facts.hidden_size * facts.itemsize
        most = scorer.runner.cache.max_bytes // text_bytes
        self.in_flight = max(1, min(scorer.in_flight, most))

    def evaluate(self, plans: Sequence[Plan]) -> dict[Plan, float]:
        """Run plans; returns the lower bounds of those that were dropped."""
        candidates = alive = [Candidate(plan) for plan in plans]
        for batch in range(len(self._scorer.batches)):
            for group in chunks(alive, self._scorer.in_flight):
                self._run(group, batch, self._shared)
            remaining = []
            for candidate in alive:
                self._score(candidate, batch, self._bound)
                if self._cannot_win(candidate):
                    candidate.hidden.clear()
                else:
                    remaining.append(candidate)
            alive = remaining
        self._scorer.evaluations += len(plans)
        for candidate in sorted(alive, key=lambda candidate: candidate.nll):
            self._finish(candidate)
        return {each.plan: each.nll for each in candidates if each.plan not in self._known}

    def keep_winner(self) -> None:
        """Cache the winner's states for the plans of the next round."""
        if self._winner is not None:
            for (batch, node), state in self._winner.states.items():
                self._scorer.runner.cache.put(batch, node, state)

    def _run(self, group: Sequence[Candidate], batch: int, shared: Plan) -> None:
        """Run plans on one batch and set their `hidden`; keeps the states of a shared prefix."""
        runner, stride = self._scorer.runner, self._scorer.stride
        prefixes = runner.prefixes(shared)

        def visit(node: Node, state: torch.Tensor) -> None:
            number, prefix = node
            if number % stride == 0 and prefix == prefixes[number]:
                runner.cache.put(batch, node, state)
            elif number % stride == 0 and len(group) == 1:
                group[0].states[batch, node] = state

        last = runner.run(batch, [candidate.plan for candidate in group], visit)
        hidden: dict[Plan, torch.Tensor] = {}
        for level, plans in runner.share_head(last):
            with runner.partial.embeddings(level):
                left = runner.partial.leave(as_one_batch([last[plan] for plan in plans]))
            hidden |= dict(zip(plans, left.chunk(len(plans)), strict=True))
        for candidate in group:
            candidate.hidden[batch] = hidden[candidate.plan]

    def _score(self, candidate: Candidate, batch: int, bound: VocabularyBound | None) -> None:
        """Set what a batch contributes to the NLL: its lower bound; without a bound, its NLL."""
        scorer, hidden = self._scorer, candidate.hidden[batch]
        with scorer.runner.partial.embeddings(candidate.plan.embeddings):
            if bound is not None:
                windows = bound.window_nll(batch, hidden)
            else:
                windows = window_nll(scorer.runner.partial, hidden, scorer.batches[batch])
                candidate.window_nll[batch] = windows
                del candidate.hidden[batch]
        value = float(windows.mean()) * (len(scorer.batches[batch]) / scorer.num_windows)
        if not math.isfinite(value):
            scorer.raise_non_finite(candidate.plan)
        candidate.contributions[batch] = value

    def _finish(self, candidate: Candidate) -> None:
        """Measure a candidate with the whole head, unless it turns out that it cannot win."""
        for batch in range(len(self._scorer.batches)):
            if self._cannot_win(candidate):
                return
            if batch not in candidate.window_nll:
                self._score(candidate, batch, None)
        windows = [candidate.window_nll[batch] for batch in range(len(candidate.window_nll))]
        values = torch.cat(windows).cpu().numpy()
        self._scorer.record(candidate.plan, values)
        value = self._known[candidate.plan] = float(values.mean())
        if value < self._best:
            self._best, self._winner = value, candidate

    def _cannot_win(self, candidate: Candidate) -> bool:
        return candidate.nll - self._tolerance > self._best
