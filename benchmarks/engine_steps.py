"""Decode steps of one row and of several beside llama.cpp: ``python -m benchmarks.engine_steps``.

Both engines read the model's own GGUF file without any plan and keep 16-bit caches. They run
in one process, in turn: a prefill in each, then the decode steps in each.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from benchmarks.measuring import Settings, alternate, ratios, spread, target, write_record
from experiments.llama_cpp import PACKAGE, LlamaCpp, gguf_file, need_llama_cpp
from experiments.study.console import run_with_settings
from rap_env.extras import package_versions
from rap_env.models.live.elastic import ElasticLLM

Call = Callable[[], None]

CELLS = ((1, 128), (1, 512), (1, 1024), (4, 128), (8, 128))
"""What is timed: rows, and tokens of each row before the first step."""

_STEP_AT_MOST = {1: 1.8, 4: 1.0, 8: 0.8}
"""Wanted times of llama.cpp's decode step, by rows."""
_PREFILL_CELL, _PREFILL_AT_MOST = (1, 512), 0.35


def in_llama_cpp(file: str, rows: int, tokens: int, steps: int, threads: int) -> list[Call]:
    """Prefill and decode steps of a GGUF file in llama.cpp, with its default cache (float16)."""
    engine = LlamaCpp(file, "f16", rows, tokens + steps, threads)

    def prefill() -> None:
        engine.clear()
        for row in range(rows):
            engine.fill(tokens, row)

    def decode() -> None:
        for at in range(tokens, tokens + steps):
            engine.decode(np.ones(rows, dtype=np.int32), at, all_logits=True, row=None)

    return [prefill, decode]


def in_our_runtime(llm: ElasticLLM, rows: int, tokens: int, steps: int) -> list[Call]:
    """Prefill and decode steps of the model as ``rap serve`` runs it."""
    from rap_env.models.live.live_batch import LiveBatch

    batch = LiveBatch(llm)
    batch.reserve_tokens = tokens + steps

    def prefill() -> None:
        batch.keep([])
        batch.prefill([[1] * tokens] * rows)

    def decode() -> None:
        for _ in range(steps):
            batch.extend([1] * rows)

    return [prefill, decode]


@dataclass
class EngineStepsSettings(Settings):
    """Settings of this benchmark; its device is the CPU."""

    model: str = "smollm2-135m"
    """A model that has a GGUF file of its own."""
    steps: int = 24
    """Decode steps of one measurement."""


def main(settings: EngineStepsSettings) -> None:
    """Measure, and write the record."""
    from rap_env.models.device import free_memory_early, return_freed_memory, use_threads
    from rap_env.serving.served_model import load_served_model
    from rap_env.serving.settings import ServerSettings

    need_llama_cpp()
    threads, steps = settings.threads or 1, settings.steps
    use_threads(threads)
    file = str(gguf_file(settings.model))
    llm = load_served_model(ServerSettings(model=settings.model, weights="native", device="cpu"))
    free_memory_early()
    return_freed_memory()
    cells, targets = {}, []
    for rows, tokens in CELLS:
        ours = in_our_runtime(llm, rows, tokens, steps)
        theirs = in_llama_cpp(file, rows, tokens, steps, threads)
        names = ("own prefill_s", "llama.cpp prefill_s", "own decode_s", "llama.cpp decode_s")
        calls = itertools.chain(*zip(ours, theirs, strict=True))
        sides = dict(zip(names, calls, strict=True))
        seconds = alternate(sides, settings.repeats)
        cells[f"{rows}x{tokens}"] = {name: spread(each) for name, each in seconds.items()}
        wanted = {"decode": ("decode step", _STEP_AT_MOST[rows])}
        if (rows, tokens) == _PREFILL_CELL:
            wanted["prefill"] = ("prefill", _PREFILL_AT_MOST)
        targets += [
            target(
                f"{what} against llama.cpp's, {rows} x {tokens} tokens",
                *ratios(seconds[f"own {side}_s"], seconds[f"llama.cpp {side}_s"]),
                at_most=at_most,
                against="llama.cpp, the same file, one thread",
            )
            for side, (what, at_most) in wanted.items()
        ]
    version = package_versions([PACKAGE]).get(PACKAGE)
    write_record("engine_steps", settings, targets, cells=cells, llama_cpp=version)


if __name__ == "__main__":
    run_with_settings(EngineStepsSettings, main)
