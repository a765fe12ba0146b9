"""An exported folder in vLLM, in an environment that has vLLM and not this project.

Reads a JSON object from the file that the argument names: ``folder``, ``dtype``, ``sequences`` of
token ids and ``prompt_tokens``. The last line of standard output is a JSON object with the tokens
that vLLM chooses after each prompt, the NLL of each whole sequence in nats per token, and vLLM's
version.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def choices(task: dict[str, Any]) -> dict[str, Any]:
    """Do a task; its and the answer's form are those of the module."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    import vllm

    sequences, prompt = task["sequences"], task["prompt_tokens"]
    engine = vllm.LLM(
        model=task["folder"],
        trust_remote_code=True,
        dtype=task["dtype"],
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=len(sequences[0]) + 1,
        max_num_seqs=len(sequences),
    )
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
    sys.stdout.write(f"\n{json.dumps(choices(json.loads(Path(sys.argv[1]).read_text())))}\n")
