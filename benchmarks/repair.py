"""What stubs cost: a decode step with them, and the fitting: ``python -m benchmarks.repair``.

A repaired mask takes the share x of the bytes away, its stubs counted as bytes that stay. Where
decoding is bound by reading memory, it is then 1 / (1 - x) times as fast; what is reached of
that is the first number here. The stubs are fitted on random tokens: neither time nor bytes
depend on what a text says.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from benchmarks.harness import (
    ModelSettings,
    Target,
    alternate,
    launch,
    open_model,
    ratios,
    spread,
    write_record,
)
from benchmarks.traffic import Traffic
from rap_env.blocks import BlockMask

if TYPE_CHECKING:
    from rap_env.llm.elastic import ElasticLLM
    from rap_env.scoring.corpus import Corpus

_OF_PROPORTIONAL = 0.9
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
    """Shares of the dense model's bytes to take away."""
    fits: int = 3
    """Times that the library is fitted."""


def main(settings: RepairSettings) -> None:
    """Measure, then write the record.

    Args:
        settings: The settings.

    Raises:
        RapError: The model cannot be loaded.
    """
    from rap_env.repair import FitConfig, fit_library

    llm = open_model(settings)
    text, held_back = (_random_text(llm, settings, seed) for seed in (0, 1))
    made: list[Any] = []

    def fit() -> None:
        config = FitConfig(rank=settings.rank)
        made.append(fit_library(llm, text, held_back, config, progress=False))

    fit_s = alternate({"fit": fit}, settings.fits, warm_up=0)["fit"]
    steps = _steps(llm, made[-1].attach(llm), settings)
    worst = min(steps.values(), key=lambda side: side["of_proportional"]["median"])
    targets = [
        Target.of(
            f"(1 - x) tokens/s over dense, stubs of mean rank {settings.rank} (worst at x = "
            f"{worst['bytes_share_removed']:.0%})",
            worst["of_proportional"],
            at_least=_OF_PROPORTIONAL,
            against="the dense model",
        ),
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

    from rap_env.scoring.corpus import Corpus

    tokens = settings.held_back_tokens if seed else settings.fit_tokens
    shape = (max(1, tokens // settings.window_tokens), settings.window_tokens)
    generator = torch.Generator().manual_seed(seed)
    return Corpus.of_tokens(torch.randint(llm.adapter.vocab_size, shape, generator=generator))


def _steps(llm: ElasticLLM, repaired: ElasticLLM, settings: RepairSettings) -> dict[str, Any]:
    """Decode steps of the dense model, and of masks with and without stubs."""
    from benchmarks.decoding import Decoding

    plain = Traffic(llm, settings.context_tokens)
    masks = {f"{share:.0%}": plain.mask(_ORDER, share) for share in settings.shares}
    sides = {"dense": (llm, BlockMask())}
    for name, mask in masks.items():
        sides |= {f"plain {name}": (llm, mask), f"repaired {name}": (repaired, mask)}
    # So many tokens are written that the context is the one asked for in the middle.
    ahead = settings.steps * (settings.repeats + 1) // 2
    context = max(1, settings.context_tokens - ahead)
    running = {name: Decoding(view, mask, 1, context) for name, (view, mask) in sides.items()}
    calls: dict[str, Any] = {
        name: lambda decoding=decoding: decoding.steps(settings.steps)
        for name, decoding in running.items()
    }
    seconds = alternate(calls, settings.repeats)
    step_s = {name: [total / settings.steps for total in seconds[name]] for name in seconds}
    traffic = Traffic(repaired, settings.context_tokens)
    return {name: _side(name, mask, step_s, traffic.share(mask)) for name, mask in masks.items()}


def _side(
    name: str, mask: BlockMask, step_s: dict[str, list[float]], share: float
) -> dict[str, Any]:
    """What one repaired mask reaches; `share` is what it takes away of the dense bytes."""
    faster = ratios(step_s["dense"], step_s[f"repaired {name}"])
    reached = {key: faster[key] * (1 - share) for key in ("median", "low", "high")}
    return {
        "blocks_removed": len(mask),
        "bytes_share_removed": share,
        "of_proportional": {**reached, "repeats": faster["repeats"]},
        "over_plain": ratios(step_s[f"repaired {name}"], step_s[f"plain {name}"]),
        "step_s": spread(step_s[f"repaired {name}"]),
    }


def _note(steps: dict[str, Any]) -> str:
    parts = [
        f"{(side['over_plain']['median'] - 1):.1%} with {side['blocks_removed']} blocks removed"
        for side in steps.values()
    ]
    return f"The stubs make a step of the same mask longer by {' and '.join(parts)}."


if __name__ == "__main__":
    launch(RepairSettings, main)
