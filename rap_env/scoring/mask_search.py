"""Searches that find the best of several masks without running every mask on the whole text.

`find_best_mask` is exact: it drops a mask as soon as a lower bound shows that it cannot win.
`successive_halving` is approximate: most masks run on a part of the text only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce

import torch

from rap_env.blocks import BlockMask
from rap_env.scoring.mask_runner import Node, chunks
from rap_env.scoring.nll import VocabularyBound, window_nll
from rap_env.scoring.scorer import MaskScorer, notify

OnScore = Callable[[BlockMask], None]

_MOST_KEPT = 16  # masks whose states may be held at the same time


@dataclass
class Candidate:
    """A mask that runs through a text batch by batch.

    Attributes:
        mask: The mask.
        hidden: Decoder output for each batch of the text that was run, (windows, T, H).
        contributions: For each batch, its share of the text's NLL, or a lower bound of it.
        window_nll: For each batch that was measured exactly, the NLL of its windows.
        states: Hidden states at the nodes on the mask's path, held while it may still win.
    """

    mask: BlockMask
    hidden: dict[int, torch.Tensor] = field(default_factory=dict)
    contributions: dict[int, float] = field(default_factory=dict)
    window_nll: dict[int, torch.Tensor] = field(default_factory=dict)
    states: dict[tuple[int, Node], torch.Tensor] = field(default_factory=dict, repr=False)

    @property
    def nll(self) -> float:
        """Sum of the contributions so far, nats per token of the whole text."""
        return sum(self.contributions.values())


class CandidateRunner:
    """Runs masks that share a prefix, such as the candidates of one GSI round.

    The states of the shared prefix are cached for all of them. The states of a single mask are
    held until it is known whether it wins, because the next round starts from them. The blocks
    that all of the masks remove are the prefix.
    """

    def __init__(self, scorer: MaskScorer, masks: Sequence[BlockMask]) -> None:
        self._scorer = scorer
        self._prefixes = scorer.runner.prefixes(reduce(lambda a, b: a & b, masks))
        self._capped = scorer.llm.spare_bytes is not None
        windows = scorer.corpus.tokens.shape[0]
        self.shares = [len(ids) / windows for ids in scorer.batches]

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
            for candidate in group:
                candidate.hidden[batch] = runner.partial.leave(last[candidate.mask])

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

    best: BlockMask
    nll: dict[BlockMask, float]
    lower_bounds: dict[BlockMask, float]


def find_best_mask(
    scorer: MaskScorer,
    masks: Sequence[BlockMask],
    *,
    near: BlockMask | None = None,
    on_score: OnScore | None = None,
) -> SearchResult:
    """Find the mask of the least NLL exactly; drops each mask as soon as it cannot win.

    The NLL of a text is a sum of non-negative terms, so the terms of a part of the text bound the
    sum from below. For the part that was run, the NLL over a subset of the vocabulary is another
    lower bound (`VocabularyBound`), so few masks need the whole head.

    Args:
        scorer: Measures the masks; it caches the score of every mask measured to the end.
        masks: At least one; likely winners first.
        near: A mask whose likely words bound the NLL of the others: the more similar, the tighter.
            It costs as much as measuring one mask. None uses no such bound, which is better for a
            few masks of nearly equal NLL.
        on_score: Called after each mask that was measured or dropped.

    Raises:
        NonFiniteScoreError: The model gave NaN or infinity.
    """
    if scorer.llm.spare_bytes is not None:
        # The memory cap leaves no room for the vocabulary bound and the held states.
        nll = dict(zip(masks, scorer.nll_many(masks, on_score), strict=True))
        return SearchResult(min(masks, key=nll.__getitem__), nll, {})
    known = {m: float(v.mean()) for m in masks if (v := scorer.look_up(m)) is not None}
    missing = [mask for mask in masks if mask not in known]
    lower_bounds: dict[BlockMask, float] = {}
    if missing:
        with scorer.llm.masked(BlockMask()):
            bound = None if near is None else _vocabulary(scorer, near)
            runner = CandidateRunner(scorer, masks)
            state = _SearchState(scorer, runner, bound, known)
            for group in chunks(missing, scorer.in_flight):
                lower_bounds |= state.evaluate(group)
                notify(on_score, group)
            state.keep_winner()
    measured = [mask for mask in masks if mask in known]
    return SearchResult(min(measured, key=known.__getitem__), known, lower_bounds)


def _vocabulary(scorer: MaskScorer, near: BlockMask) -> VocabularyBound:
    """The bound from the entries that are likely under a mask."""
    runner, candidate = CandidateRunner(scorer, [near]), Candidate(near)
    batches = scorer.batches
    for batch in range(len(batches)):
        runner.evaluate_batch([candidate], batch)
    hidden = [candidate.hidden[batch] for batch in range(len(batches))]
    return VocabularyBound(scorer.runner.partial, hidden, batches)


class _SearchState:
    """One exact search: runs candidates and tracks the best one so far."""

    def __init__(
        self,
        scorer: MaskScorer,
        runner: CandidateRunner,
        bound: VocabularyBound | None,
        known: dict[BlockMask, float],
    ) -> None:
        self._scorer, self._runner, self._bound = scorer, runner, bound
        self._known = known  # NLL of the masks measured to the end; grows
        self._best = min(known.values(), default=math.inf)
        self._tolerance = 0.0 if bound is None else bound.tolerance
        self._winner: Candidate | None = None

    def evaluate(self, masks: Sequence[BlockMask]) -> dict[BlockMask, float]:
        """Run masks; returns the lower bounds of those that were dropped."""
        candidates = [Candidate(mask) for mask in masks]
        alive = candidates
        for batch in range(len(self._scorer.batches)):
            self._runner.evaluate_batch(alive, batch)
            for candidate in alive:
                self._bound_batch(candidate, batch)
            alive = [candidate for candidate in alive if not self._cannot_win(candidate)]
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
        hidden, ids = candidate.hidden[batch], self._scorer.batches[batch]
        candidate.window_nll[batch] = window_nll(self._scorer.runner.partial, hidden, ids)
        self._runner.add(candidate, batch, candidate.window_nll[batch])

    def _cannot_win(self, candidate: Candidate) -> bool:
        return candidate.nll - self._tolerance > self._best


@dataclass(frozen=True)
class Stage:
    """One stage of successive halving.

    Attributes:
        batches: Batches of the text that run in this stage.
        max_masks: Most masks that run them: those that were best until then.
    """

    batches: tuple[int, ...]
    max_masks: int


def successive_halving(
    scorer: MaskScorer,
    masks: Sequence[BlockMask],
    stages: Sequence[Stage],
    *,
    rank: Callable[[Candidate], float] = lambda candidate: candidate.nll,
    on_score: OnScore | None = None,
) -> list[Candidate]:
    """Run masks through a text in stages, each with more of the text and fewer masks.

    Successive halving (Karnin, Koren and Somekh, Almost Optimal Exploration in Multi-Armed
    Bandits, ICML 2013). Nothing is stored, because the NLL of a part is not a score of the text.
    Each batch of the text belongs to one of the stages. `rank` decides which masks continue, the
    least first; by default the contributions of the batches that were run. The masks of the last
    stage are compared by their NLL; the first of equal masks wins. `on_score` is called after each
    mask that leaves the search.

    Returns:
        All masks with the contributions of the batches that they were run on, the winner first:
        it was run on the whole text.
    """
    runner, model = CandidateRunner(scorer, masks), scorer.runner.partial
    alive = [Candidate(mask) for mask in masks]
    dropped: list[Candidate] = []
    with scorer.llm.masked(BlockMask()):
        for number, stage in enumerate(stages):
            ranked = sorted(alive, key=rank) if number else alive
            alive, leaving = ranked[: stage.max_masks], ranked[stage.max_masks :]
            dropped = leaving + dropped
            _leave(scorer, leaving, on_score)
            for batch in stage.batches:
                for group in chunks(alive, scorer.in_flight):
                    runner.evaluate_batch(group, batch, hold_states=len(alive) <= _MOST_KEPT)
                    for candidate in group:
                        hidden, ids = candidate.hidden.pop(batch), scorer.batches[batch]
                        runner.add(candidate, batch, window_nll(model, hidden, ids))
    alive.sort(key=lambda candidate: candidate.nll)
    runner.keep_states(alive[0])
    _leave(scorer, alive, on_score)
    return [*alive, *dropped]


def _leave(scorer: MaskScorer, candidates: Sequence[Candidate], on_score: OnScore | None) -> None:
    """Count candidates that leave the search and free their states."""
    for candidate in candidates:
        candidate.states.clear()
        scorer.count(candidate.mask)
    notify(on_score, [candidate.mask for candidate in candidates])
