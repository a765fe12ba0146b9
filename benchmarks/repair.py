"""Cost of stubs: a decode step with them, and fitting them: ``python -m benchmarks.repair``.

A repaired mask removes the share x of the bytes; its stubs count as bytes that stay. If decoding is
bound by reading memory, it is then 1 / (1 - x) times as fast. The first target is the reached part
of that speed-up. The stubs are fitted on random tokens: time and bytes do not depend on the text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks.decode_step import MemoryTraffic, decode_seconds, of_proportional, worst_target
from benchmarks.harness import ModelSettings, Target, alternate, launch, open_model, ratios, spread
from benchmarks.record import write_record
from rap_env.blocks import BlockMask
from rap_env.models.live.elastic import ElasticLLM
from rap_env.scoring.corpus import Corpus

_FIT_S = 180.0
_ORDER = "even"


@dataclass
class RepairSettings(ModelSettings):
    """Settings of this benchmark."""

    fit_tokens: int = 8192
    held_back_tokens: int = 2048
    window_tokens: int = 128
    rank: int = 64
    context_tokens: int = 512
    steps: int = 8
    """Decode steps in one measurement."""
    shares: list[float] = field(default_factory=lambda: [0.15, 0.3])
    """Shares of the dense model's bytes to remove."""
    fits: int = 3
    """Times that the library is fitted."""


def main(settings: RepairSettings) -> None:
    """Measure, and write the record."""
    from rap_env.repair.config import FitConfig
    from rap_env.repair.fitting import fit_library

    llm = open_model(settings)
    text, held_back = (_random_text(llm, settings, seed) for seed in (0, 1))
    made: list[Any] = []

    def fit() -> None:
        config = FitConfig(rank=settings.rank)
        made.append(fit_library(llm, text, held_back, config, progress=False))

    fit_s = alternate({"fit": fit}, settings.fits, warm_up=0)["fit"]
    steps = _steps(llm, made[-1].attach(llm), settings)
    targets = [
        worst_target(f"stubs of mean rank {settings.rank}", steps.values()),
        Target.of(
            f"seconds to fit on {settings.fit_tokens:,} tokens", spread(fit_s), at_most=_FIT_S
        ),
    ]
    write_record(
        "repair",
        device=str(llm.device),
        settings=settings,
        targets=targets,
        measured={"decode": steps, "fit_s": spread(fit_s), "library_bytes": made[-1].nbytes},
        notes=[_note(steps)],
    )


def _random_text(llm: ElasticLLM, settings: RepairSettings, seed: int) -> Corpus:
    import torch

    tokens = settings.held_back_tokens if seed else settings.fit_tokens
    shape = (max(1, tokens // settings.window_tokens), settings.window_tokens)
    generator = torch.Generator().manual_seed(seed)
    return Corpus.of_tokens(torch.randint(llm.adapter.vocab_size, shape, generator=generator))


def _steps(llm: ElasticLLM, repaired: ElasticLLM, settings: RepairSettings) -> dict[str, Any]:
    """Decode steps of the dense model, and of masks with and without stubs."""
    plain = MemoryTraffic(llm, settings.context_tokens)
    masks = {f"{share:.0%}": plain.mask(_ORDER, share) for share in settings.shares}
    sides = {"dense": (llm, BlockMask())}
    for name, mask in masks.items():
        sides |= {f"plain {name}": (llm, mask), f"repaired {name}": (repaired, mask)}
    step_s = decode_seconds(sides, settings.context_tokens, settings.steps, settings.repeats)
    traffic = MemoryTraffic(repaired, settings.context_tokens)
    return {name: _side(name, mask, step_s, traffic.share(mask)) for name, mask in masks.items()}


def _side(
    name: str, mask: BlockMask, step_s: dict[str, list[float]], share: float
) -> dict[str, Any]:
    """Results of one repaired mask, which removes `share` of the dense model's bytes."""
    repaired_s = step_s[f"repaired {name}"]
    return {
        "blocks_removed": len(mask),
        "bytes_share_removed": share,
        "of_proportional": of_proportional(step_s["dense"], repaired_s, share),
        "over_plain": ratios(repaired_s, step_s[f"plain {name}"]),
        "step_s": spread(repaired_s),
    }


def _note(steps: dict[str, Any]) -> str:
    parts = [
        f"{(side['over_plain']['median'] - 1):.1%} with {side['blocks_removed']} blocks removed"
        for side in steps.values()
    ]
    return f"The stubs make a step of the same mask longer by {' and '.join(parts)}."


if __name__ == "__main__":
    launch(RepairSettings, main)
