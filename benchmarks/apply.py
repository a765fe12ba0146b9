"""Time of a mask change, relative to a decode step: ``python -m benchmarks.apply``."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

from benchmarks.decode_step import Decoding
from benchmarks.harness import ModelSettings, Target, alternate, launch, open_model, ratios, spread
from benchmarks.record import write_record
from rap_env.blocks import BlockMask


@dataclass
class ApplySettings(ModelSettings):
    """Settings of this benchmark."""

    blocks: int = 20
    """Blocks of each mask; the two share none, so that a change swaps all blocks of both."""
    context_tokens: int = 512
    steps: int = 8
    """Decode steps in one measurement."""
    changes: int = 1000
    """Changes of the mask in one measurement."""


def main(settings: ApplySettings) -> None:
    """Measure, and write the record."""
    llm = open_model(settings)
    drawn = random.Random(0).sample(range(llm.num_blocks), 2 * settings.blocks)
    masks = [BlockMask.of(*drawn[half::2]) for half in (0, 1)]
    dense = Decoding(llm, BlockMask(), 1, settings.context_tokens)

    def change() -> None:
        for mask in itertools.islice(itertools.cycle(masks), settings.changes):
            llm.apply(mask)

    seconds = alternate(
        {"decode": lambda: dense.steps(settings.steps), "apply": change}, settings.repeats
    )
    llm.apply(BlockMask())
    change_s = [total / settings.changes for total in seconds["apply"]]
    step_s = [total / settings.steps for total in seconds["decode"]]
    share = ratios([100 * value for value in change_s], step_s)
    write_record(
        "apply",
        device=str(llm.device),
        settings=settings,
        targets=[
            Target.of(
                "% of a decode step that a change of the mask takes",
                share,
                at_most=2.0,
                against=f"a dense decode step: {1000 * spread(step_s)['median']:.1f} ms",
            )
        ],
        measured={"change_s": spread(change_s), "decode_step_s": spread(step_s)},
        notes=[f"{llm.facts.dtype}, batch 1, {settings.context_tokens} tokens of context."],
    )


if __name__ == "__main__":
    launch(ApplySettings, main)
