"""One plan in one engine, in a process of its own: seconds of prefill and decode, resident memory.

Reads a JSON object from standard input: ``engine`` (a key of `ENGINES`), ``rows`` (sequences; 1 by
default), ``context_tokens`` of each, ``steps``, ``repeats``, ``threads``, and ``file`` (GGUF),
``model``, ``weights`` and ``removed`` (indices of blocks), or ``folder`` and ``dtype`` (vLLM). The
last line of standard output is a JSON object: ``prefill_s`` and ``decode_s`` (of all steps), one
number for each repeat, ``resident_bytes`` after them, and ``library_bytes`` before the model was
opened. With ``sequences`` of token ids and ``prompt_tokens``, vLLM answers with the tokens that it
chooses after each prompt, the NLL of each sequence in nats per token, and its version.

The process of llama.cpp has no torch, and that of vLLM has vLLM and not this project.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Protocol

Task = dict[str, Any]


class Serving(Protocol):
    """A model that serves one plan to some sequences of equal length."""

    def prefill(self) -> None:
        """Forget all tokens and run the prompts."""

    def decode(self) -> None:
        """Run the decode steps behind the prompts, one token of each sequence."""


class InLlamaCpp:
    """A GGUF file in llama.cpp, with its default cache (float16)."""

    def __init__(self, task: Task) -> None:
        from experiments.ladder.llama_cpp_process import LlamaCpp

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
        import numpy as np

        for at in range(self._prompt, self._prompt + self._steps):
            self._engine.step(np.ones(self._rows, dtype=np.int32), at)


class InOurRuntime:
    """The model as ``rap serve`` runs it, under a plan that is not changed."""

    def __init__(self, task: Task) -> None:
        from rap_env.models.device import free_memory_early, return_freed_memory
        from rap_env.models.live.live_batch import LiveBatch
        from rap_env.plan import Plan
        from rap_env.serving.settings import ServerSettings
        from rap_env.serving.stack import load_served_model

        settings = ServerSettings(model=task["model"], weights=task["weights"], device="cpu")
        llm = load_served_model(settings)
        free_memory_early()
        llm.apply(Plan.removing(*task["removed"]))
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


class InVLLM:
    """An exported folder in vLLM; the prefill gives the first token, and `decode` repeats it."""

    def __init__(self, task: Task) -> None:
        self._steps = task["steps"]
        self._engine = open_vllm(task, task["context_tokens"] + self._steps + 1, 1)
        self._prompt = {"prompt_token_ids": [1] * task["context_tokens"]}

    def prefill(self) -> None:
        """Run the prompt."""
        self._generate(1)

    def decode(self) -> None:
        """Run the prompt and the decode steps."""
        self._generate(1 + self._steps)

    def _generate(self, new_tokens: int) -> None:
        import vllm

        greedy = vllm.SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
        self._engine.generate([self._prompt], greedy, use_tqdm=False)


ENGINES: dict[str, tuple[type, str]] = {
    "llama.cpp": (InLlamaCpp, "experiments.ladder.llama_cpp_process"),
    "own": (InOurRuntime, "rap_env.serving.stack"),
    "vLLM": (InVLLM, "vllm"),
}
"""The class of each engine, and the module whose memory counts as its library."""


def measure(task: Task) -> dict[str, Any]:
    """Do a task; its and the answer's form are those of the module."""
    opened, library = ENGINES[task["engine"]]
    importlib.import_module(library)
    if task["engine"] == "own":
        from rap_env.models.device import use_threads

        use_threads(task["threads"])
    library_bytes = resident_bytes()
    serving: Serving = opened(task)
    seconds: dict[str, list[float]] = {"prefill_s": [], "decode_s": []}
    for _ in range(task["repeats"] + 1):  # the first one warms up
        for name, run in (("prefill_s", serving.prefill), ("decode_s", serving.decode)):
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
        if task["engine"] == "vLLM":
            seconds["decode_s"][-1] -= seconds["prefill_s"][-1]
    times = {name: each[1:] for name, each in seconds.items()}
    return {**times, "resident_bytes": resident_bytes(), "library_bytes": library_bytes}


def resident_bytes() -> int:
    """Resident memory of this process (Linux)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024


def open_vllm(task: Task, tokens: int, rows: int) -> Any:
    """The folder of a task in vLLM, for sequences of at most so many tokens."""
    import vllm

    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    return vllm.LLM(
        model=task["folder"],
        trust_remote_code=True,
        dtype=task["dtype"],
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=tokens,
        max_num_seqs=rows,
    )


def choose_in_vllm(task: Task) -> dict[str, Any]:
    """The tokens that vLLM chooses, and the NLL of whole sequences."""
    import vllm

    sequences, prompt = task["sequences"], task["prompt_tokens"]
    engine = open_vllm(task, len(sequences[0]) + 1, len(sequences))
    new_tokens = len(sequences[0]) - prompt
    greedy = vllm.SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    prompts = [{"prompt_token_ids": ids[:prompt]} for ids in sequences]
    tokens = [list(answer.outputs[0].token_ids) for answer in engine.generate(prompts, greedy)]
    score = vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    scored = engine.generate([{"prompt_token_ids": ids} for ids in sequences], score)
    nll = []
    for ids, answer in zip(sequences, scored, strict=True):
        steps = zip(ids[1:], answer.prompt_logprobs[1:], strict=True)
        nll.append(-sum(step[token].logprob for token, step in steps) / (len(ids) - 1))
    return {"tokens": tokens, "nll": nll, "version": vllm.__version__}


if __name__ == "__main__":
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    given = json.load(sys.stdin)
    answer = choose_in_vllm(given) if "sequences" in given else measure(given)
    sys.stdout.write(f"\n{json.dumps(answer)}\n")
