"""Finds the best of several masks or plans exactly, without running each on the whole text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from rap_env.plan import Plan
from rap_env.scoring.interface import OnScore, notify
from rap_env.scoring.nll import VocabularyBound, window_nll
from rap_env.scoring.plan_runner import Node, chunks, joined, shared_plan
from rap_env.scoring.scorer import MaskScorer


@dataclass
class Candidate:
    """A mask or plan that runs through a text batch by batch.

    Attributes:
        mask: The plan.
        hidden: Decoder output for each batch that was run but not measured yet, (windows, T, H).
        contributions: For each batch, its share of the text's NLL, or a lower bound of it.
        window_nll: For each batch that was measured exactly, the NLL of its windows.
        states: Hidden states at the nodes on its path, held while it may still win.
    """

    mask: Plan
    hidden: dict[int, torch.Tensor] = field(default_factory=dict)
    contributions: dict[int, float] = field(default_factory=dict)
    window_nll: dict[int, torch.Tensor] = field(default_factory=dict)
    states: dict[tuple[int, Node], torch.Tensor] = field(default_factory=dict, repr=False)

    @property
    def nll(self) -> float:
        """Sum of the contributions so far, nats per token of the whole text."""
        return sum(self.contributions.values())


class CandidateRunner:
    """Runs masks or plans that share a prefix, such as the candidates of one GSI round.

    The states of the shared prefix are cached for all of them. The states of a single one are
    held until it is known whether it wins, because the next round starts from them. The prefix is
    what `shared_plan` finds.
    """

    def __init__(self, scorer: MaskScorer, masks: Sequence[Plan]) -> None:
        self._scorer = scorer
        self._prefixes = scorer.runner.prefixes(shared_plan(masks))
        self._capped = scorer.llm.spare_bytes is not None
        windows = scorer.corpus.tokens.shape[0]
        self.shares = [len(ids) / windows for ids in scorer.batches]

    @property
    def together(self) -> int:
        """Candidates that may hold the decoder's output for the whole text at the same time.

        Those of one group advance together; what they hold stays within the bytes of the cache.
        """
        facts, tokens = self._scorer.llm.facts, self._scorer.corpus.tokens.numel()
        text_bytes = tokens * facts.hidden_size * facts.itemsize
        most = self._scorer.runner.cache.max_bytes // text_bytes
        return max(1, min(self._scorer.in_flight, most))

    def evaluate_batch(
        self, candidates: Sequence[Candidate], batch: int, *, hold_states: bool = True
    ) -> None:
        """Run masks on one batch of the text and set their `hidden`.

        With `hold_states`, the states of masks that run alone are held as long as they may still
        win; never where memory is capped.
        """
        runner = self._scorer.runner
        for group in chunks(candidates, self._scorer.in_flight):
            alone = hold_states and len(group) == 1 and not self._capped
            visit = partial(self._visit, batch, group[0] if alone else None)
            last = runner.run(batch, [candidate.mask for candidate in group], visit)
            hidden: dict[Plan, torch.Tensor] = {}
            for level, masks in runner.share_head(last):
                with runner.partial.embeddings(level):
                    left = runner.partial.leave(joined([last[mask] for mask in masks]))
                hidden |= dict(zip(masks, left.chunk(len(masks)), strict=True))
            for candidate in group:
                candidate.hidden[batch] = hidden[candidate.mask]

    def head(self, candidate: Candidate) -> AbstractContextManager[object]:
        """Run the head at the candidate's level in a ``with`` block."""
        return self._scorer.runner.partial.embeddings(candidate.mask.embeddings)

    def measure(self, candidate: Candidate, batch: int) -> torch.Tensor:
        """Measure a batch with the whole head, add its contribution and free its `hidden`.

        Returns:
            The NLL of each window, (windows,).
        """
        with self.head(candidate):
            windows = window_nll(
                self._scorer.runner.partial, candidate.hidden[batch], self._scorer.batches[batch]
            )
        self.add(candidate, batch, windows)
        del candidate.hidden[batch]
        return windows

    def add(self, candidate: Candidate, batch: int, windows: torch.Tensor) -> None:
        """Set what a batch contributes to the text's NLL, from the NLL of its windows.

        Raises:
            NonFiniteScoreError: The contribution is NaN or infinite.
        """
        value = float(windows.mean()) * self.shares[batch]
        if not math.isfinite(value):
            self._scorer.raise_non_finite(candidate.mask)
        candidate.contributions[batch] = value

    def keep_states(self, winner: Candidate) -> None:
        """Cache the winner's states for the masks of the next round."""
        for (batch, node), state in winner.states.items():
            self._scorer.runner.cache.put(batch, node, state)

    def _visit(self, batch: int, holder: Candidate | None, node: Node, state: torch.Tensor) -> None:
        number, prefix = node
        if number % self._scorer.stride:
            return
        if prefix == self._prefixes[number]:
            self._scorer.runner.cache.put(batch, node, state)
        elif holder is not None:
            holder.states[batch, node] = state


@dataclass(frozen=True)
class SearchResult:
    """Result of an exact search, nats per token.

    Attributes:
        best: The mask of the least NLL; the first such mask if several are equal.
        nll: NLL of every mask that was measured on the whole text.
        lower_bounds: For the other masks, a lower bound of their NLL (up to rounding).
    """

    best: Plan
    nll: dict[Plan, float]
    lower_bounds: dict[Plan, float]


def find_best_mask(
    scorer: MaskScorer,
    masks: Sequence[Plan],
    *,
    near: Plan | None = None,
    on_score: OnScore | None = None,
) -> SearchResult:
    """Find the mask of the least NLL exactly; drops each mask as soon as it cannot win.

    The NLL of a text is a sum of non-negative terms, so the terms of a part of the text bound the
    sum from below. For the part that was run, the NLL over a subset of the vocabulary is another
    lower bound (`VocabularyBound`), so few masks need the whole head.

    Args:
        scorer: Measures the masks; it caches the score of every mask measured to the end.
        masks: At least one; likely winners first.
        near: A mask or plan whose likely words bound the NLL of the others: the more similar, the
            tighter. It costs as much as measuring one mask. None uses no such bound, which is
            better for a few masks of nearly equal NLL. Without effect unless all have the same
            level of the embeddings.
        on_score: Called after each mask that was measured or dropped.

    Raises:
        NonFiniteScoreError: The model gave NaN or infinity.
    """
    masks = list(masks)
    if scorer.llm.spare_bytes is not None:
        # The memory cap leaves no room for the vocabulary bound and the held states.
        nll = dict(zip(masks, scorer.nll_many(masks, on_score), strict=True))
        return SearchResult(min(masks, key=nll.__getitem__), nll, {})
    known = {m: float(v.mean()) for m in masks if (v := scorer.look_up(m)) is not None}
    missing = [mask for mask in masks if mask not in known]
    lower_bounds: dict[Plan, float] = {}
    if scorer.workers is not None and len(missing) > 1:
        job = replace(scorer.job, search=True, near=near)
        # A lower bound above the best of a part is above the best of all.
        for found in scorer.workers.measure(job, missing):
            scorer.take(found)
            known |= {mask: float(values.mean()) for mask, values in found.window_nll.items()}
            lower_bounds |= found.lower_bounds
            notify(on_score, found.plans)
    elif missing:
        with scorer.llm.masked(Plan()):
            bound = None
            if near is not None and len({mask.embeddings for mask in (near, *masks)}) == 1:
                bound = _vocabulary(scorer, near)
            runner = CandidateRunner(scorer, masks)
            state = _SearchState(scorer, runner, bound, known)
            for group in chunks(missing, runner.together if bound else scorer.in_flight):
                lower_bounds |= state.evaluate(group)
                notify(on_score, group)
            state.keep_winner()
    measured = [mask for mask in masks if mask in known]
    return SearchResult(min(measured, key=known.__getitem__), known, lower_bounds)


def _vocabulary(scorer: MaskScorer, near: Plan) -> VocabularyBound:
    """The bound from the entries that are likely under a mask."""
    runner, candidate = CandidateRunner(scorer, [near]), Candidate(near)
    batches = scorer.batches
    for batch in range(len(batches)):
        runner.evaluate_batch([candidate], batch)
    hidden = [candidate.hidden[batch] for batch in range(len(batches))]
    with runner.head(candidate):
        return VocabularyBound(scorer.runner.partial, hidden, batches)


class _SearchState:
    """One exact search: runs candidates and tracks the best one so far."""

    def __init__(
        self,
        scorer: MaskScorer,
        runner: CandidateRunner,
        bound: VocabularyBound | None,
        known: dict[Plan, float],
    ) -> None:
        self._scorer, self._runner, self._bound = scorer, runner, bound
        self._known = known  # NLL of the masks measured to the end; grows
        self._best = min(known.values(), default=math.inf)
        self._tolerance = 0.0 if bound is None else bound.tolerance
        self._winner: Candidate | None = None

    def evaluate(self, masks: Sequence[Plan]) -> dict[Plan, float]:
        """Run masks; returns the lower bounds of those that were dropped."""
        candidates = [Candidate(mask) for mask in masks]
        alive = candidates
        for batch in range(len(self._scorer.batches)):
            self._runner.evaluate_batch(alive, batch)
            remaining = []
            for candidate in alive:
                self._bound_batch(candidate, batch)
                if self._cannot_win(candidate):
                    candidate.hidden.clear()
                else:
                    remaining.append(candidate)
            alive = remaining
        for mask in masks:
            self._scorer.count(mask)
        for candidate in sorted(alive, key=lambda candidate: candidate.nll):
            self._finish(candidate)
        return {one.mask: one.nll for one in candidates if one.mask not in self._known}

    def keep_winner(self) -> None:
        """Cache the winner's states."""
        if self._winner is not None:
            self._runner.keep_states(self._winner)

    def _bound_batch(self, candidate: Candidate, batch: int) -> None:
        """Add a batch's lower bound, or its exact NLL if there is no vocabulary bound."""
        if self._bound is None:
            self._measure(candidate, batch)
        else:
            with self._runner.head(candidate):
                windows = self._bound.window_nll(batch, candidate.hidden[batch])
            self._runner.add(candidate, batch, windows)

    def _finish(self, candidate: Candidate) -> None:
        """Measure a candidate with the whole head, unless it turns out that it cannot win."""
        for batch in range(len(self._scorer.batches)):
            if self._cannot_win(candidate):
                return
            if batch not in candidate.window_nll:
                self._measure(candidate, batch)
        windows = [candidate.window_nll[batch] for batch in range(len(candidate.window_nll))]
        values = torch.cat(windows).cpu().numpy()
        self._scorer.record(candidate.mask, values)
        value = self._known[candidate.mask] = float(values.mean())
        if value < self._best:
            self._best, self._winner = value, candidate

    def _measure(self, candidate: Candidate, batch: int) -> None:
        candidate.window_nll[batch] = self._runner.measure(candidate, batch)

    def _cannot_win(self, candidate: Candidate) -> bool:
        return candidate.nll - self._tolerance > self._best
