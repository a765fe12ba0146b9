"""Exact and lazy GSI against the naive loop: ``python -m benchmarks.gsi``.

The naive loop and the exact search alternate round by round, so that a slow phase of the machine
affects both; the lazy search runs as a whole, several times.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.harness import Target, launch, ratios, spread
from benchmarks.record import write_record
from benchmarks.scoring_setup import (
    NaiveLoop,
    ScoringSettings,
    ScoringSetup,
    naive_loop,
    open_setup,
)  # fmt: skip
from rap_env.blocks import BlockMask
from rap_env.importance.gsi_search import gsi, gsi_rounds
from rap_env.importance.profiles import GSIProfile
from rap_env.scoring.scorer import MaskScorer

_AGAINST = "one full forward of a plain model for each candidate"
_PROBES = 5
_TOLERANCE = 1e-2  # nats per token; on a GPU, blocks that cost the same may change places


@dataclass
class GSISettings(ScoringSettings):
    """Settings of this benchmark."""

    removals: int = 24
    """Blocks that are removed."""


@dataclass(frozen=True)
class NaiveRound:
    """One round of the naive loop: seconds of each candidate, and the removed block."""

    seconds: list[float]
    block: int
    nll: float


def main(settings: GSISettings) -> None:
    """Measure, check that the order is the naive loop's, and write the record."""
    setup = open_setup(settings)
    with naive_loop(setup) as loop:
        naive, exact_s, exact = _side_by_side(setup, loop, settings.removals)
        naive_s = [sum(one.seconds) for one in naive]
        quick, drift = {}, {"at_start": _dense(loop)}
        for method in ("lazy",):
            quick[method] = [_whole(setup, method) for _ in range(settings.repeats)]
            drift[f"after_{method}"] = _dense(loop)
    with naive_loop(setup, keep_freed_memory=True) as loop:
        drift["with_freed_memory_kept"] = _dense(loop)
    total = sum(naive_s)
    targets = [
        Target(
            "exact GSI, times as fast", 2.2, None, total / sum(exact_s), _AGAINST,
            *(ratios(naive_s, exact_s)[end] for end in ("low", "high")),
        )
    ]  # fmt: skip
    measured: dict[str, Any] = {
        "naive_s": total,
        "naive_candidate_s": spread([s for one in naive for s in one.seconds]),
        "naive_dense_forward_s": drift,
        "exact": _describe(exact, [sum(exact_s)], exact),
        "same_order_as_naive": [one.block for one in naive] == list(exact.order_indices),
        "order": [block.name for block in exact.order],
        "largest_nll_difference": max(
            abs(one.nll - nll) for one, nll in zip(naive, exact.nll_after, strict=True)
        ),
    }
    for (method, runs), wanted, near in zip(quick.items(), (9.0,), (1.01,), strict=True):
        seconds, profile = [s for s, _ in runs], runs[0][1]
        nll = _true_nll(setup, profile)
        times = spread([total / s for s in seconds])
        targets.append(
            Target.of(f"{method} GSI, times as fast", times, at_least=wanted, against=_AGAINST)
        )
        targets.append(
            Target(f"{method} GSI, final NLL over exact's", None, near, nll / exact.nll_after[-1])
        )
        measured[method] = {**_describe(profile, seconds, exact), "final_nll": nll}
    apart, exactly = measured["largest_nll_difference"], setup.device == "cpu"
    if not measured["same_order_as_naive"] and (exactly or apart > _TOLERANCE):
        raise SystemExit("Exact GSI gave another order than the naive loop; nothing was recorded.")
    notes = [
        "A ratio is total naive seconds over total seconds; for exact the spread is that of the "
        "rounds, each against the naive round.",
        "naive_dense_forward_s shows how the machine drifted, and what the naive loop would gain "
        "from keeping freed memory as this project does.",
    ]
    write_record(
        "gsi", device=setup.device, settings=settings, targets=targets, measured=measured,
        notes=notes,
    )  # fmt: skip


def _side_by_side(
    setup: ScoringSetup, loop: NaiveLoop, removals: int
) -> tuple[list[NaiveRound], list[float], GSIProfile]:
    """Run the naive loop and the exact search in turn: rounds, exact seconds, exact result.

    The naive loop measures the dense model no more than the exact search does: not at all.
    """
    scorer = MaskScorer(setup.llm, setup.corpus)
    rounds = gsi_rounds(scorer, stop=removals)
    profile = next(rounds)
    naive: list[NaiveRound] = []
    exact_s: list[float] = []
    for found in _naive_rounds(setup, loop, removals):
        naive.append(found)
        began = time.perf_counter()
        profile = next(rounds)
        exact_s.append(time.perf_counter() - began)
        print(
            f"round {len(naive)}: naive {sum(found.seconds):.1f} s, exact {exact_s[-1]:.1f} s, "
            f"{profile.order[-1].name}",
            flush=True,
        )
    return naive, exact_s, profile


def _naive_rounds(setup: ScoringSetup, loop: NaiveLoop, removals: int) -> Iterator[NaiveRound]:
    removed = BlockMask()
    for _ in range(removals):
        candidates = [block.index for block in setup.llm.blocks if block not in removed]
        scores = [loop(removed | BlockMask.of(index)) for index in candidates]
        nll, best = min((nll, index) for (_, nll), index in zip(scores, candidates, strict=True))
        removed = removed | BlockMask.of(best)
        yield NaiveRound([seconds for seconds, _ in scores], best, nll)


def _whole(setup: ScoringSetup, method: Any) -> tuple[float, GSIProfile]:
    settings = setup.settings
    assert isinstance(settings, GSISettings)
    scorer = MaskScorer(setup.llm, setup.corpus)
    _ = scorer.dense_nll
    began = time.perf_counter()
    profile = gsi(scorer, method=method, stop=settings.removals, progress=False)
    spent = time.perf_counter() - began
    print(
        f"{method}: {spent:.1f} s, loss {profile.nll_after[-1] - profile.dense_nll:.3f}", flush=True
    )
    return spent, profile


def _true_nll(setup: ScoringSetup, profile: GSIProfile) -> float:
    """NLL without the blocks that a method removed, measured in the same way for all methods."""
    return MaskScorer(setup.llm, setup.corpus).nll(BlockMask.of(*profile.order_indices))


def _dense(loop: NaiveLoop) -> float:
    return statistics.median(loop(BlockMask())[0] for _ in range(_PROBES))


def _describe(profile: GSIProfile, seconds: list[float], exact: GSIProfile) -> dict[str, Any]:
    shared = set(profile.order_indices) & set(exact.order_indices)
    return {
        "seconds": spread(seconds),
        "candidates": sum(profile.candidates),
        "block_forwards": profile.block_forwards,
        "blocks_removed_as_by_exact": len(shared),
    }


if __name__ == "__main__":
    launch(GSISettings, main)
