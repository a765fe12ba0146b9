"""Decode steps of one row and of several beside llama.cpp: ``python -m benchmarks.engine_steps``.

Both engines read the model's own GGUF file without any plan and keep 16-bit caches. They run in one
process, in turn: a prefill in each, then the decode steps in each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from benchmarks.engine_process import InLlamaCpp, InOurRuntime
from benchmarks.harness import Settings, alternate, launch, parse_request, ratios, spread
from benchmarks.record import Target, write_record
from experiments.ladder.llama_cpp import PACKAGE, gguf_file, need_llama_cpp
from experiments.study.run_folder import package_versions

_STEP_AT_MOST = {1: 1.8, 4: 1.0, 8: 0.8}
"""Wanted times of llama.cpp's decode step, by rows."""
_PREFILL_TOKENS, _PREFILL_AT_MOST = 512, 0.35
_AGAINST = "llama.cpp, the same file, one thread"


@dataclass
class EngineStepsSettings(Settings):
    """Settings of this benchmark; its device is the CPU."""

    model: str = "smollm2-135m"
    """A model that has a GGUF file of its own."""
    cells: list[str] = field(default_factory=lambda: ["1x128", "1x512", "1x1024", "4x128", "8x128"])
    """What is timed: rows x tokens of each row before the first step."""
    steps: int = 24
    """Decode steps of one measurement."""


def main(settings: EngineStepsSettings) -> None:
    """Measure, and write the record."""
    from rap_env.models.device import use_threads  # loads torch

    need_llama_cpp()
    threads = settings.threads or 1
    use_threads(threads)
    common = {"threads": threads, "steps": settings.steps}
    own = {"model": settings.model, "weights": "native", "removed": [], **common}
    other = {"file": str(gguf_file(settings.model)), **common}
    seconds = {}
    targets: list[Target] = []
    for cell in settings.cells:
        rows, tokens = parse_request(cell)
        size = {"rows": rows, "context_tokens": tokens}
        ours, theirs = InOurRuntime({**own, **size}), InLlamaCpp({**other, **size})
        sides = {
            "own prefill_s": ours.prefill, "llama.cpp prefill_s": theirs.prefill,
            "own decode_s": ours.decode, "llama.cpp decode_s": theirs.decode,
        }  # fmt: skip
        seconds[cell] = alternate(sides, settings.repeats)
        targets += targets_of(seconds[cell], rows, tokens)
    write_record(
        "engine_steps",
        device="cpu",
        settings=settings,
        targets=targets,
        measured={
            "cells": {
                cell: {name: spread(each) for name, each in sides.items()}
                for cell, sides in seconds.items()
            },
            "llama_cpp": package_versions([PACKAGE]).get(PACKAGE),
        },
        notes=[
            f"decode_s: seconds of {settings.steps} decode steps behind the prompts; prefill_s: of "
            "all prompts of the cell."
        ],
    )


def targets_of(seconds: Mapping[str, list[float]], rows: int, tokens: int) -> Iterator[Target]:
    """The targets of one cell.

    Args:
        seconds: ``ENGINE prefill_s`` and ``ENGINE decode_s`` of both engines, paired.
        rows: Rows of the cell.
        tokens: Tokens of each.
    """

    def target(what: str, name: str, at_most: float) -> Target:
        measured = ratios(seconds[f"own {name}"], seconds[f"llama.cpp {name}"])
        what = f"{what} against llama.cpp's, {rows} x {tokens} tokens"
        return Target.of(what, measured, at_most=at_most, against=_AGAINST)

    if rows in _STEP_AT_MOST:
        yield target("decode step", "decode_s", _STEP_AT_MOST[rows])
    if (rows, tokens) == (1, _PREFILL_TOKENS):
        yield target("prefill", "prefill_s", _PREFILL_AT_MOST)


if __name__ == "__main__":
    launch(EngineStepsSettings, main)
