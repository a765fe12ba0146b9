"""Masks that change while the model generates: ``python -m benchmarks.live``.

Measures the time of a mask change relative to a decode step, and the time of a KV-cache refill
relative to a prefill of the same tokens.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from benchmarks.harness import (
    ModelSettings,
    alternate,
    launch,
    open_model,
    ratios,
    spread,
)
from benchmarks.record import Target, write_record
from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.live.live_batch import LiveBatch
from rap_env.plan import Plan


@dataclass
class LiveSettings(ModelSettings):
    """Settings of this benchmark."""

    blocks: int = 20
    """Blocks of the mask that is applied and lifted."""
    context_tokens: int = 512
    steps: int = 8
    """Decode steps in one measurement."""
    refill_tokens: list[int] = field(default_factory=lambda: [128, 512, 1024])
    """Tokens in the cache when attention blocks are restored."""


def main(settings: LiveSettings) -> None:
    """Measure, and write the record."""
    llm = open_model(settings)
    drawn = random.Random(0).sample(range(llm.num_blocks), llm.num_blocks)
    mask = Plan.removing(*drawn[: settings.blocks])
    switch = _switching(llm, mask, settings)
    refills = {str(n): _refilling(llm, mask, n, settings) for n in settings.refill_tokens}
    targets = [
        Target.of(
            "% of a decode step that removing blocks takes, their keys and values included",
            switch["share_percent"],
            at_most=2.0,
            against=f"a dense decode step: {1000 * switch['step_s']['median']:.1f} ms",
        )
    ]
    targets += [
        Target.of(
            f"times a prefill that a refill of {tokens} tokens takes",
            refill["ratio"],
            at_most=1.1,
            against=f"a prefill: {refill['prefill_s']['median']:.2f} s",
        )
        for tokens, refill in refills.items()
    ]
    write_record(
        "live",
        device=str(llm.device),
        settings=settings,
        targets=targets,
        measured={"switch": switch, "refill": refills},
        notes=[
            f"{llm.facts.dtype}; {settings.blocks} random blocks with resident weights; "
            f"{settings.context_tokens} tokens of context.",
        ],
    )


def _prompt(llm: ElasticLLM, tokens: int) -> list[int]:
    return random.Random(1).choices(range(llm.adapter.vocab_size), k=tokens)


def _switching(llm: ElasticLLM, mask: Plan, settings: LiveSettings) -> dict[str, Any]:
    """Seconds of removing and restoring blocks with a full cache, and of decode steps."""
    prompt = _prompt(llm, settings.context_tokens)
    batches: list[LiveBatch] = []

    def prepare() -> None:
        batches[:] = [LiveBatch(llm, restore="next_request")]
        batches[0].prefill([prompt])
        batches[0].extend([0])

    def decode() -> None:
        for _ in range(settings.steps):
            batches[0].extend([0])

    seconds = alternate(
        {
            "prepare": prepare,
            "decode": decode,
            "remove": lambda: llm.apply(mask),
            "restore": lambda: llm.apply(Plan()),
        },
        settings.repeats,
    )
    steps = [total / settings.steps for total in seconds["decode"]]
    return {
        "share_percent": ratios([100 * total for total in seconds["remove"]], steps),
        "step_s": spread(steps),
        "remove_s": spread(seconds["remove"]),
        "restore_s": spread(seconds["restore"]),
    }


def _refilling(llm: ElasticLLM, mask: Plan, tokens: int, settings: LiveSettings) -> dict[str, Any]:
    """Time of the step that refills the cache minus a plain step, and of a prefill."""
    prompt = _prompt(llm, tokens)
    batches: list[LiveBatch] = []

    def prepare() -> None:
        batches.clear()
        llm.apply(mask)
        batch = LiveBatch(llm)
        batch.prefill([prompt])
        llm.apply(Plan())
        batches.append(batch)

    sides = {
        "prepare": prepare,
        "refill": lambda: batches[0].extend([0]),
        "step": lambda: batches[0].extend([0]),
        "prefill": lambda: LiveBatch(llm).prefill([prompt]),
    }
    seconds = alternate(sides, settings.repeats)
    refill_s = [a - b for a, b in zip(seconds["refill"], seconds["step"], strict=True)]
    return {
        "ratio": ratios(refill_s, seconds["prefill"]),
        "refill_s": spread(refill_s),
        "prefill_s": spread(seconds["prefill"]),
        "affected_layers": mask.count_removed("attn"),
    }


if __name__ == "__main__":
    launch(LiveSettings, main)
