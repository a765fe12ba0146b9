"""Greedy sequential importance (GSI): remove the least important block, measure again, repeat."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from rap_env.blocks import block_index, block_name
from rap_env.errors import ArtifactError, check_name
from rap_env.importance.gsi_strategies import STRATEGIES, GSIState, GSIStrategy
from rap_env.importance.profiles import GSIProfile
from rap_env.models.progress import progress_bar
from rap_env.plan import Plan
from rap_env.scoring.scorer import MaskScorer, bar_callback


def gsi(
    scorer: MaskScorer,
    *,
    method: str = "exact",
    stop: int | None = None,
    path: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> GSIProfile:
    """Find the order in which to remove blocks so that the NLL rises least in each round.

    Args:
        scorer: Measures masks on the calibration text.
        method: ``"exact"`` finds the block of the least NLL in every round and drops candidates
            as soon as they cannot win; it gives the order of the naive loop. ``"lazy"`` measures
            only the candidates with the least last known rise again, and more of them if one
            has risen; it is several times faster, and may miss a block that the exact search finds.
        stop: Removals after which to stop; None continues until no block is left.
        path: File of the artifact. It is written after each removal. A profile of the same model
            and text that already exists there is continued.
        progress: Whether to draw a progress bar.

    Returns:
        The profile, with at least `stop` removals.

    Raises:
        UnknownNameError: An unknown method.
        ArtifactError: The file at `path` is damaged, or of another model or text.
    """
    with progress_bar(progress, desc="GSI", unit="mask", leave=False) as bar:
        for profile in gsi_rounds(
            scorer, method=method, stop=stop, path=path, on_score=bar_callback(bar)
        ):
            removed = len(profile.order_indices)
            left = range(profile.num_blocks, 0, -1)  # candidates of each round
            bar.total = sum(left[: _rounds(scorer, stop)])
            bar.update(sum(left[:removed]) - bar.n)  # includes candidates that were not examined
            rise = (profile.dense_nll, *profile.nll_after)[-1] - profile.dense_nll
            bar.set_postfix_str(f"{removed} removed, delta_nll {rise:.3f}")
    return profile


def gsi_rounds(
    scorer: MaskScorer,
    *,
    method: str = "exact",
    stop: int | None = None,
    path: str | os.PathLike[str] | None = None,
    on_score: Callable[[Plan], None] = lambda _: None,
) -> Iterator[GSIProfile]:
    """Run `gsi` with its arguments, and yield the profile at the start and after each removal.

    `on_score` is called after each examined mask.
    """
    check_name("GSI method", method, STRATEGIES)
    profile = _start(scorer, method, path)
    strategy, rounds = STRATEGIES[method](scorer), _rounds(scorer, stop)
    yield profile
    while len(profile.order_indices) < rounds:
        profile = _next_round(strategy, profile, rounds, on_score)
        if path is not None:
            profile.save(path)
        yield profile


def _rounds(scorer: MaskScorer, stop: int | None) -> int:
    """Number of removals to make."""
    return min(scorer.llm.facts.num_blocks, scorer.llm.facts.num_blocks if stop is None else stop)


def _start(scorer: MaskScorer, method: str, path: str | os.PathLike[str] | None) -> GSIProfile:
    """An empty profile, or the one saved at `path`."""
    facts = scorer.llm.facts
    if path is not None and Path(path).exists():
        found = GSIProfile.load(path, scorer.llm)
        if found.method != method:
            raise ArtifactError(
                f"{os.fspath(path)} was measured with method={found.method!r}, not {method!r}; "
                "give another path or delete it."
            )
        if found.provenance["scoring"] != dict(scorer.context):
            raise ArtifactError(
                f"{os.fspath(path)} was measured on other text or in another way "
                f"({found.provenance['text']}); give another path or delete it."
            )
        return found
    before = scorer.evaluations, scorer.block_forwards
    dense_nll = scorer.dense_nll
    return GSIProfile(
        method=method,
        num_blocks=facts.num_blocks,
        param_bytes=facts.block_param_bytes,
        order_indices=(),
        dense_nll=dense_nll,
        nll_after=(),
        first_nll=(),
        left_loss={},
        candidates=(),
        evaluations=1,  # the dense model
        evaluations_run=scorer.evaluations - before[0],
        block_forwards=scorer.block_forwards - before[1],
        seconds=0.0,
        provenance=scorer.provenance,
    )


def _next_round(
    strategy: GSIStrategy, profile: GSIProfile, rounds: int, on_score: Callable[[Plan], None]
) -> GSIProfile:
    """Remove the block whose removal raises the NLL least."""
    began = time.perf_counter()
    before = strategy.evaluations, strategy.block_forwards
    done = len(profile.order_indices)
    known = {block_index(name): rise for name, rise in profile.left_loss.items()}
    nll = (profile.dense_nll, *profile.nll_after)[-1]
    state = GSIState(profile.order_indices, nll, known, last=done + 1 == rounds)
    found = strategy.next(state, on_score)
    known |= found.delta_nll
    if not done:
        first = tuple(profile.dense_nll + known[i] for i in range(profile.num_blocks))
        profile = replace(profile, first_nll=first)
    return replace(
        profile,
        order_indices=(*profile.order_indices, found.block),
        nll_after=(*profile.nll_after, found.nll),
        left_loss={block_name(i): rise for i, rise in known.items() if i != found.block},
        candidates=(*profile.candidates, len(found.delta_nll)),
        evaluations=profile.evaluations + len(found.delta_nll),
        evaluations_run=profile.evaluations_run + strategy.evaluations - before[0],
        block_forwards=profile.block_forwards + strategy.block_forwards - before[1],
        seconds=profile.seconds + time.perf_counter() - began,
    )
