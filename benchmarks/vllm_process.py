"""One exported folder in vLLM, in an environment that has vLLM and not this project.

Reads a JSON object from standard input and writes one as the last line of standard output. For a
task with ``folder``, ``dtype``, ``sequences`` of token ids and ``prompt_tokens``, it has the tokens
that vLLM generates after each prompt, the NLL of each whole sequence in nats per token, and vLLM's
version. For one with ``context_tokens``, ``steps`` and ``repeats`` in the place of sequences, it is
what `benchmarks.engine_process` answers.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def run(task: dict[str, Any]) -> dict[str, Any]:
    """Do a task; its and the answer's form are those of the module."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    return compare(task) if "sequences" in task else measure(task)


def open_engine(task: dict[str, Any], tokens: int, rows: int) -> Any:
    """The folder of a task in vLLM, for sequences of at most so many tokens."""
    import vllm

    return vllm.LLM(
        model=task["folder"],
        trust_remote_code=True,
        dtype=task["dtype"],
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=tokens,
        max_num_seqs=rows,
    )


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Seconds of the prefill and of the decode steps behind it, and resident memory."""
    import vllm

    context, steps, libraries = task["context_tokens"], task["steps"], resident_bytes()
    engine = open_engine(task, context + steps + 1, 1)
    prompt: Any = {"prompt_token_ids": [1] * context}

    def seconds(new_tokens: int) -> float:
        greedy = vllm.SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
        began = time.perf_counter()
        engine.generate([prompt], greedy, use_tqdm=False)
        return time.perf_counter() - began

    seconds(1 + steps)  # warms up
    prefill, whole = [], []
    for _ in range(task["repeats"]):
        prefill.append(seconds(1))  # the prefill gives the first token
        whole.append(seconds(1 + steps))
    return {
        "prefill_s": prefill,
        "decode_s": [both - first for both, first in zip(whole, prefill, strict=True)],
        "resident_bytes": resident_bytes(),
        "library_bytes": libraries,
    }


def resident_bytes() -> int:
    """Resident memory of this process (Linux)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024


def compare(task: dict[str, Any]) -> dict[str, Any]:
    """The tokens that vLLM chooses, and the NLL of whole sequences."""
    import vllm

    sequences, prompt = task["sequences"], task["prompt_tokens"]
    engine = open_engine(task, len(sequences[0]) + 1, len(sequences))
    greedy = vllm.SamplingParams(
        temperature=0, max_tokens=len(sequences[0]) - prompt, ignore_eos=True
    )
    given = [{"prompt_token_ids": ids[:prompt]} for ids in sequences]
    tokens = [list(found.outputs[0].token_ids) for found in engine.generate(given, greedy)]
    score = vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    scored = engine.generate([{"prompt_token_ids": ids} for ids in sequences], score)
    nll = []
    for ids, found in zip(sequences, scored, strict=True):
        steps = zip(ids[1:], found.prompt_logprobs[1:], strict=True)
        nll.append(-sum(step[token].logprob for token, step in steps) / (len(ids) - 1))
    return {"tokens": tokens, "nll": nll, "version": vllm.__version__}


if __name__ == "__main__":
    answer = run(json.load(sys.stdin))
    sys.stdout.write(f"\n{json.dumps(answer)}\n")
