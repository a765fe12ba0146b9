"""Decode steps of one row and of several beside llama.cpp: ``python -m benchmarks.engine_steps``.

Both engines read the model's own GGUF file without any plan and keep 16-bit caches. Each cell runs
in a process of its own, first in one engine, then in the other, for several rounds; the ratios are
of two processes that ran one after the other.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks import harness
from benchmarks.engines import answer_of
from benchmarks.record import write_record
from experiments.comparison.run_folder import package_versions
from experiments.ladder.llama_cpp import PACKAGE, gguf_file, need_llama_cpp

_ENGINES = ("own", "llama.cpp")
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
    rounds: int = 3
    """Processes of each engine and cell, each with so many repeats."""

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
    need_llama_cpp()
    cells = list(cells_of(settings.cells))
    threads = settings.threads or 1
    models: dict[str, dict[str, Any]] = {
        "own": {"model": settings.model, "weights": "native", "removed": []},
        "llama.cpp": {"file": str(gguf_file(settings.model))},
    }
    program = [sys.executable, "-m", "benchmarks.engine_process"]
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for _ in range(settings.rounds):
        for name, rows, tokens in cells:
            size = {"rows": rows, "context_tokens": tokens, "threads": threads}
            counts = {"steps": settings.steps, "repeats": settings.repeats}
            for engine in _ENGINES:
                task = {"engine": engine, **models[engine], **size, **counts}
                answer = answer_of(program, task)
                times = found.setdefault(name, {}).setdefault(engine, {})
                for what in ("prefill_s", "decode_s"):
                    times.setdefault(what, []).extend(answer[what])
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


def targets_of(
    engines: Mapping[str, Mapping[str, list[float]]], rows: int, tokens: int
) -> Iterator[harness.Target]:
    """What is wanted of one cell, and was measured there.

    Args:
        engines: ``prefill_s`` and ``decode_s`` of each engine, paired.
        rows: Rows of the cell.
        tokens: Tokens of each.
    """
    own, other = (engines[name] for name in _ENGINES)
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
