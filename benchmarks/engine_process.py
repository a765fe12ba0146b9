"""One plan in one engine, in a process of its own: seconds of prefill and decode, resident memory.

``python -m benchmarks.engine_process`` reads a JSON object from standard input: ``engine``
(``llama.cpp`` or ``own``), ``rows`` (sequences; 1 by default), ``context_tokens`` of each,
``steps``, ``repeats``, ``threads``, and ``file`` (GGUF) or ``model``, ``weights`` and ``removed``
(indices of blocks). The last line of standard output is a JSON object: ``prefill_s`` and
``decode_s`` (of all steps), one number for each repeat, ``resident_bytes`` after them, and
``library_bytes`` before the model was opened. llama.cpp runs without torch in the process. What
vLLM needs is in `benchmarks.vllm_process`.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from experiments.ladder.llama_cpp_process import LlamaCpp, resident_bytes


class Serving(Protocol):
    """A model that serves one plan to some sequences of equal length."""

    def prefill(self) -> None:
        """Forget all tokens and run the prompts."""

    def decode(self) -> None:
        """Run the decode steps behind the prompts, one token of each sequence."""


class InLlamaCpp:
    """A GGUF file in llama.cpp, with its default cache (float16)."""

    def __init__(self, task: dict[str, Any]) -> None:
        self._prompt, self._steps = task["context_tokens"], task["steps"]
        self._rows, tokens = task.get("rows", 1), self._prompt + self._steps
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
    """The model as ``rap serve`` runs it, under a plan that is not changed."""

    def __init__(self, task: dict[str, Any]) -> None:
        from rap_env.blocks import BlockMask
        from rap_env.models.device import free_memory_early, return_freed_memory
        from rap_env.models.live.live_batch import LiveBatch
        from rap_env.serving.settings import ServerSettings
        from rap_env.serving.stack import load_served_model

        settings = ServerSettings(model=task["model"], weights=task["weights"], device="cpu")
        llm = load_served_model(settings)
        free_memory_early()
        llm.apply(BlockMask.of(*task["removed"]))
        return_freed_memory()
        self._batch = LiveBatch(llm)
        self._prompts = [[1] * task["context_tokens"]] * task.get("rows", 1)
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


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Do a task; its and the answer's form are those of the module."""
    opened: Callable[[dict[str, Any]], Serving] = InLlamaCpp
    if task["engine"] == "own":
        stack = importlib.import_module("rap_env.serving.stack")  # counts as a library
        stack.use_threads(task["threads"])
        opened = InOurRuntime
    libraries = resident_bytes()
    serving = opened(task)
    found: dict[str, list[float]] = {"prefill_s": [], "decode_s": []}
    for _ in range(task["repeats"] + 1):  # the first one warms up
        for name, run in (("prefill_s", serving.prefill), ("decode_s", serving.decode)):
            began = time.perf_counter()
            run()
            found[name].append(time.perf_counter() - began)
    times = {name: seconds[1:] for name, seconds in found.items()}
    return {**times, "resident_bytes": resident_bytes(), "library_bytes": libraries}


if __name__ == "__main__":
    answer = measure(json.load(sys.stdin))
    sys.stdout.write(f"\n{json.dumps(answer)}\n")
