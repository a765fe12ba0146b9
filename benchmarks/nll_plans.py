"""Scoring of plans, against masks of as many different blocks: ``python -m benchmarks.nll_plans``.

The masks are those of a few episodes that remove one random block after the other. A plan removes
the same blocks as a mask and lowers items that the mask keeps, each item to one level, so plans
share exactly as many steps as the masks do. All sides run in turn in one process, each with a new
scorer, so that plans pay for widening their weights; quantising them is done before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from benchmarks.harness import Target, alternate, launch, ratios, spread
from benchmarks.record import write_record
from benchmarks.scoring_setup import ScoringSettings, ScoringSetup, open_setup
from rap_env.blocks import BlockMask
from rap_env.model_facts import ModelFacts
from rap_env.plan import CompressionPlan, MaskOrPlan
from rap_env.scoring.scorer import MaskScorer

_WEIGHTS = "plans with lowered weights, times the time of masks"
_AGAINST = "masks with as many different blocks"


@dataclass
class NLLPlansSettings(ScoringSettings):
    """Settings of this benchmark."""

    episodes: int = 4
    """Episodes that give the masks."""
    removals: int = 12
    """Masks of an episode; each removes one block more."""


def main(settings: NLLPlansSettings) -> None:
    """Measure, check that all sides ran as many blocks, and write the record."""
    setup = open_setup(settings)
    masks = episode_masks(setup.llm.num_blocks, settings.episodes, settings.removals)
    sides = plan_sides(setup.llm.facts, masks)
    scorers: dict[str, tuple[float, float]] = {}

    def run(name: str, plans: list[MaskOrPlan]) -> Callable[[], None]:
        def score() -> None:
            scorer = MaskScorer(setup.llm, setup.corpus)
            nll = scorer.nll_many(plans)
            scorers[name] = scorer.block_forwards, float(np.mean(nll))

        return score

    seconds = alternate({n: run(n, plans) for n, plans in sides.items()}, settings.repeats)
    if len({blocks for blocks, _ in scorers.values()}) != 1:
        raise SystemExit(f"The sides did not run as many blocks: {scorers}; nothing was recorded.")
    times = {name: ratios(seconds[name], seconds["masks"]) for name in sides}
    weights = [name for name in sides if name.startswith("weights")]
    write_record(
        "nll_plans",
        device=setup.device,
        settings=settings,
        targets=[
            Target.of(f"{_WEIGHTS} ({name})", times[name], at_most=1.15, against=_AGAINST)
            for name in weights
        ],
        measured={
            "plans": len(masks),
            "block_forwards": scorers["masks"][0],
            "seconds": {name: spread(values) for name, values in seconds.items()},
            "times_masks": times,
            "mean_nll": {name: nll for name, (_, nll) in scorers.items()},
        },
        notes=_notes(setup),
    )


def episode_masks(num_blocks: int, episodes: int, removals: int) -> list[BlockMask]:
    """Nested masks of episodes that remove random blocks, with a fixed seed."""
    rng = np.random.default_rng(0)
    orders = [rng.permutation(num_blocks)[:removals] for _ in range(episodes)]
    return [BlockMask.of(*order[: n + 1].tolist()) for order in orders for n in range(len(order))]


def plan_sides(facts: ModelFacts, masks: list[BlockMask]) -> dict[str, list[MaskOrPlan]]:
    """The masks and, by what they lower, plans that remove the same blocks."""
    layers, blocks = facts.num_layers, range(facts.num_blocks)
    lowered: dict[str, CompressionPlan] = {}
    for level in ("int8", "int4"):
        known = tuple((i, level) for i in blocks if level in facts.weight_levels(i))
        lowered[f"weights {level}"] = CompressionPlan(weights=known)
        lowered[f"caches {level}"] = CompressionPlan.uniform(layers, caches=level)
    sides: dict[str, list[MaskOrPlan]] = {"masks": list(masks)}
    return sides | {
        name: [plan.without(mask) for mask in masks] for name, plan in lowered.items() if plan
    }


def _notes(setup: ScoringSetup) -> list[str]:
    tokens = setup.corpus.tokens
    return [
        f"Windows of {tokens.shape[1]} tokens: a lowered cache stores "
        f"{(tokens.shape[1] - 1) // 32} groups of 32 tokens of each.",
        "mean_nll is the mean over the plans of a side, nats per token.",
    ]


if __name__ == "__main__":
    launch(NLLPlansSettings, main)
