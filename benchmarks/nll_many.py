"""Scoring of many masks, against a full forward pass for each: ``python -m benchmarks.nll_many``.

The masks are those that a MaskablePPO agent scored during a training on the model, in two ways:
with a reward at each step, all masks of its episodes; with a reward at the end, only the last mask
of each episode, which share far fewer blocks.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agents.algorithms import AgentConfig
from agents.training import train
from benchmarks.harness import Target, launch, ratios, spread
from benchmarks.record import write_record
from benchmarks.scoring_setup import ScoringSettings, ScoringSetup, naive_loop, open_setup
from rap_env.blocks import BlockMask
from rap_env.context.live import LiveContext
from rap_env.envs.vector import RAPPruneVectorEnv
from rap_env.scoring.corpus import CorpusConfig
from rap_env.scoring.corpus_loading import load_corpus
from rap_env.scoring.scorer import METRIC, MaskScorer
from rap_env.scoring.store import ScoreStore, context_key

_AGAINST = "one full forward of a plain model for each mask"
_NAMES = {
    "dense": "all masks of episodes, times as fast",
    "terminal": "last masks of episodes, times as fast",
}
_LEAST_SLICES = 8
_EQUALITY_CHECKS = 8
_TOLERANCE = 1e-3  # a plain model's loss sums in another order
_WIDTHS = (1, 2, 4)
_WIDTH_MASKS = 16


@dataclass
class NLLManySettings(ScoringSettings):
    """Settings of this benchmark."""

    masks: int = 256
    """Number of masks to score."""
    train_steps: int = 6144
    """Steps of the training that gives the last masks of episodes."""


def main(settings: NLLManySettings) -> None:
    """Measure, check the scores, and write the record."""
    setup = open_setup(settings)
    targets: list[Target] = []
    measured: dict[str, Any] = {}
    for timing, steps in (("dense", settings.masks), ("terminal", settings.train_steps)):
        masks = rollout_masks(setup, timing, steps)[: settings.masks]
        ours_s, naive_s, facts = _in_turn(setup, masks, max(_LEAST_SLICES, settings.repeats))
        ratio, slices = sum(naive_s) / sum(ours_s), ratios(naive_s, ours_s)
        targets.append(
            Target(_NAMES[timing], 1.8, None, ratio, _AGAINST, slices["low"], slices["high"])
        )
        measured[timing] = {
            "masks": len(masks),
            "blocks_removed": spread([len(mask) for mask in masks]),
            "seconds": sum(ours_s),
            "naive_s": sum(naive_s),
            **facts,
        }
    measured["seconds_by_masks_in_a_batch"] = _widths(setup, masks[:_WIDTH_MASKS])
    write_record(
        "nll_many",
        device=setup.device,
        settings=settings,
        targets=targets,
        measured=measured,
        notes=[
            "The spread is that of slices of the masks, each against the naive loop.",
            f"{_EQUALITY_CHECKS} masks of each kind were checked to have the score of a single "
            "pass, bit for bit where each mask has its own batch (on a CPU).",
        ],
    )


def rollout_masks(setup: ScoringSetup, timing: str, steps: int) -> list[BlockMask]:
    """Masks that a training on the model scored, shuffled with a fixed seed.

    Args:
        setup: The model. The training's own text is short, since only its masks are used.
        timing: Timing of the reward (see `rap_env.reward`).
        steps: Steps of the training.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = ScoreStore(Path(folder) / "scores.sqlite")
        text = load_corpus(CorpusConfig(windows=1, window_tokens=128), setup.llm)
        context = LiveContext(setup.llm, text, store, importance="none", progress=False)
        train(
            AgentConfig(name="maskable_ppo", total_timesteps=steps),
            lambda num_envs: RAPPruneVectorEnv(
                num_envs=num_envs,
                context=context,
                reward={"name": "perplexity", "timing": timing},
                autoreset_mode="SameStep",
            ),
            Path(folder) / "run",
        )
        rows = store.rows(context_key(context.scorer.context), METRIC)
        masks = sorted((mask for mask, _ in rows if mask), key=tuple)
        store.close()
    return [masks[place] for place in np.random.default_rng(0).permutation(len(masks))]


def _in_turn(
    setup: ScoringSetup, masks: list[BlockMask], slices: int
) -> tuple[list[float], list[float], dict[str, float]]:
    """Call `nll_many` once; after each slice of it the naive loop scores the same masks.

    Returns:
        Seconds of each slice on both sides, and facts for the record.
    """
    scorer = MaskScorer(setup.llm, setup.corpus)
    scorer_s: list[float] = []
    naive_s: list[float] = []
    naive: dict[BlockMask, float] = {}
    waiting: list[BlockMask] = []
    with naive_loop(setup) as loop:
        began = time.perf_counter()

        def on_score(mask: BlockMask) -> None:
            nonlocal began
            waiting.append(mask)
            if len(waiting) * slices < len(masks) and len(naive) + len(waiting) < len(masks):
                return
            scorer_s.append(time.perf_counter() - began)
            answers = {mask: loop(mask) for mask in waiting}
            naive_s.append(sum(seconds for seconds, _ in answers.values()))
            naive.update({mask: nll for mask, (_, nll) in answers.items()})
            print(
                f"{len(waiting)} masks: {scorer_s[-1]:.1f} s, naive {naive_s[-1]:.1f} s", flush=True
            )
            waiting.clear()
            began = time.perf_counter()

        values = scorer.nll_many(masks, on_score)
    single = [MaskScorer(setup.llm, setup.corpus).nll(m) for m in masks[:_EQUALITY_CHECKS]]
    rounding = 0.0 if scorer.runner.width == 1 else _TOLERANCE  # of batches of other widths
    apart = max(abs(a - b) for a, b in zip(single, values, strict=False))
    difference = max(abs(naive[mask] - nll) for mask, nll in zip(masks, values, strict=True))
    if apart > rounding or difference > _TOLERANCE:
        raise SystemExit("Scores differ from those of single passes; nothing was recorded.")
    facts = {
        "share_of_blocks_saved": scorer.share_saved,
        "largest_nll_difference_to_naive": difference,
    }
    return scorer_s, naive_s, facts


def _widths(setup: ScoringSetup, masks: list[BlockMask]) -> dict[str, float]:
    """Seconds for a few masks by the number of masks per batch."""
    seconds = {}
    for width in _WIDTHS:
        scorer = MaskScorer(setup.llm, setup.corpus, masks_together=width)
        began = time.perf_counter()
        scorer.nll_many(masks)
        seconds[str(width)] = time.perf_counter() - began
    return seconds


if __name__ == "__main__":
    launch(NLLManySettings, main)
