"""Decode steps of one row and of several beside llama.cpp: ``python -m benchmarks.engine_steps``.

Both engines read the model's own GGUF file without any plan and keep 16-bit caches. They run in one
process, in turn: a prefill in each, then the decode steps in each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from benchmarks import harness
from benchmarks.engine_process import InLlamaCpp, InOurRuntime, Serving
from benchmarks.record import write_record
from experiments.comparison.run_folder import package_versions
from experiments.ladder.llama_cpp import PACKAGE, gguf_file, need_llama_cpp

_STEP_AT_MOST = {1: 1.8, 4: 1.0, 8: 0.8}
"""Wanted times of llama.cpp's decode step, by rows."""
_PREFILL_TOKENS, _PREFILL_AT_MOST = 512, 0.35


@dataclass
class EngineStepsSettings(harness.Settings):
    """Settings of this benchmark; its device is the CPU."""

    model: str = "smollm2-135m"
    """A model that has a GGUF file of its own."""
    cells: list[str] = field(default_factory=lambda: ["1x128", "1x512", "1x1024", "4x128", "8x128"])
    """What is timed: rows x tokens of each row before the first step."""
    steps: int = 24
    """Decode steps of one measurement."""

    def __post_init__(self) -> None:
        """Reject malformed cells."""
        super().__post_init__()
        list(cells_of(self.cells))


def cells_of(names: Iterable[str]) -> Iterator[tuple[str, int, int]]:
    """Name, rows and tokens of each cell.

    Raises:
        ValueError: A name is not of the form rows x tokens.
    """
    for name in names:
        rows, times, tokens = name.partition("x")
        if not (times and rows.isdecimal() and tokens.isdecimal() and int(rows) * int(tokens)):
            raise ValueError(f"{name!r} is no cell; write rows x tokens, such as 4x128.")
        yield name, int(rows), int(tokens)


def main(settings: EngineStepsSettings) -> None:
    """Measure, and write the record."""
    from rap_env.models.device import use_threads  # loads torch

    need_llama_cpp()
    threads = settings.threads or 1
    use_threads(threads)
    common = {"threads": threads, "steps": settings.steps}
    own = {"model": settings.model, "weights": "native", "removed": [], **common}
    other = {"file": str(gguf_file(settings.model)), **common}
    cells, found = list(cells_of(settings.cells)), {}
    for name, rows, tokens in cells:
        size = {"rows": rows, "context_tokens": tokens}
        found[name] = times_of(
            {"own": InOurRuntime({**own, **size}), "llama.cpp": InLlamaCpp({**other, **size})},
            settings.repeats,
        )
    targets = [
        target for name, rows, tokens in cells for target in targets_of(found[name], rows, tokens)
    ]
    write_record(
        "engine_steps",
        device="cpu",
        settings=settings,
        targets=targets,
        measured={
            "cells": {
                name: {
                    engine: {what: harness.spread(values) for what, values in times.items()}
                    for engine, times in engines.items()
                }
                for name, engines in found.items()
            },
            "llama_cpp": package_versions([PACKAGE]).get(PACKAGE),
        },
        notes=[
            f"decode_s: seconds of {settings.steps} decode steps behind the prompts; prefill_s: of "
            "all prompts of the cell."
        ],
    )


def times_of(engines: Mapping[str, Serving], repeats: int) -> dict[str, dict[str, list[float]]]:
    """``prefill_s`` and ``decode_s`` of each engine, one number for each repeat."""
    found: dict[str, dict[str, list[float]]] = {name: {} for name in engines}
    for repeat in range(repeats + 1):  # the first one warms up
        for what in ("prefill", "decode"):
            for name, engine in engines.items():
                seconds = harness.seconds_of(getattr(engine, what))
                if repeat:
                    found[name].setdefault(f"{what}_s", []).append(seconds)
    return found


def targets_of(
    engines: Mapping[str, Mapping[str, list[float]]], rows: int, tokens: int
) -> Iterator[harness.Target]:
    """What is wanted of one cell, and was measured there.

    Args:
        engines: ``prefill_s`` and ``decode_s`` of each engine, paired.
        rows: Rows of the cell.
        tokens: Tokens of each.
    """
    own, other = engines["own"], engines["llama.cpp"]
    case = f"{rows} x {tokens} tokens"
    if rows in _STEP_AT_MOST:
        yield harness.Target.of(
            f"decode step against llama.cpp's, {case}",
            harness.ratios(own["decode_s"], other["decode_s"]),
            at_most=_STEP_AT_MOST[rows],
            against="llama.cpp, the same file, one thread",
        )
    if (rows, tokens) == (1, _PREFILL_TOKENS):
        yield harness.Target.of(
            f"prefill against llama.cpp's, {case}",
            harness.ratios(own["prefill_s"], other["prefill_s"]),
            at_most=_PREFILL_AT_MOST,
            against="llama.cpp, the same file, one thread",
        )


if __name__ == "__main__":
    harness.launch(EngineStepsSettings, main)
