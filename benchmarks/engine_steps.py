"""Decode steps of one row and of several beside llama.cpp: ``python -m benchmarks.engine_steps``.

Both engines read the model's own GGUF file without any plan and keep 16-bit caches. They run in one
process, in turn: a prefill in each, then the decode steps in each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.measuring import Settings, alternate, ratios, spread
from benchmarks.record import Target, write_record
from experiments.config.common import parse_shape
from experiments.llama_cpp import PACKAGE, LlamaCpp, gguf_file, need_llama_cpp
from experiments.study.console import run_with_settings
from experiments.study.run_folder import package_versions

_STEP_AT_MOST = {1: 1.8, 4: 1.0, 8: 0.8}
"""Wanted times of llama.cpp's decode step, by rows."""
_PREFILL_TOKENS, _PREFILL_AT_MOST = 512, 0.35
_AGAINST = "llama.cpp, the same file, one thread"


class InLlamaCpp:
    """A GGUF file in llama.cpp, with its default cache (float16)."""

    def __init__(self, task: dict[str, Any]) -> None:
        self._prompt, self._steps = task["context_tokens"], task["steps"]
        self._rows, tokens = task["rows"], self._prompt + self._steps
        self._engine = LlamaCpp(task["file"], "f16", self._rows, tokens, task["threads"])

    def prefill(self) -> None:
        """Run the prompts with an empty cache."""
        self._engine.clear()
        for row in range(self._rows):
            self._engine.fill(self._prompt, row)

    def decode(self) -> None:
        """Run the decode steps."""
        for at in range(self._prompt, self._prompt + self._steps):
            self._engine.step(np.ones(self._rows, dtype=np.int32), at)


class InOurRuntime:
    """The model as ``rap serve`` runs it, with the file's own weights."""

    def __init__(self, task: dict[str, Any]) -> None:
        from rap_env.models.device import free_memory_early, return_freed_memory
        from rap_env.models.live.live_batch import LiveBatch
        from rap_env.serving.served_model import load_served_model
        from rap_env.serving.settings import ServerSettings

        settings = ServerSettings(model=task["model"], weights="native", device="cpu")
        llm = load_served_model(settings)
        free_memory_early()
        return_freed_memory()
        self._batch = LiveBatch(llm)
        self._prompts = [[1] * task["context_tokens"]] * task["rows"]
        self._steps = task["steps"]
        self._batch.reserve_tokens = task["context_tokens"] + self._steps

    def prefill(self) -> None:
        """Run the prompts with an empty cache."""
        self._batch.keep([])
        self._batch.prefill(self._prompts)

    def decode(self) -> None:
        """Run the decode steps."""
        for _ in range(self._steps):
            self._batch.extend([1] * len(self._prompts))


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
    own = {"model": settings.model, **common}
    other = {"file": str(gguf_file(settings.model)), **common}
    seconds = {}
    targets: list[Target] = []
    for cell in settings.cells:
        rows, tokens = parse_shape(cell)
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
    run_with_settings(EngineStepsSettings, main)
