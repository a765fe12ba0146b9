"""Resident memory of a loaded model, against transformers: ``python -m benchmarks.resident``.

Each measurement starts a Python process that loads the model, generates a few tokens, and reports
its resident memory, in all and beyond what it had with all libraries but without a model.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from benchmarks.harness import Settings, Target, launch, ratios, spread
from benchmarks.record import write_record

_RESIDENT = """
import json, sys
def resident():
    with open("/proc/self/status", encoding="utf-8") as file:
        return int(file.read().partition("VmRSS:")[2].split()[0]) * 1024
def ids(torch):
    return torch.arange(64)[None] % 32 + 4
"""
_OURS = f"""{_RESIDENT}
import rap_env, torch, transformers, rap_env.serving.server
torch.ones(8, 8) @ torch.ones(8, 8)
before = resident()
llm = rap_env.load_llm(sys.argv[1], weights=sys.argv[2], dtype=sys.argv[3])
llm.generate(ids(torch), max_new_tokens=8, do_sample=False)
print(json.dumps({{"all": resident(), "model": resident() - before}}))
"""
_PEER = f"""{_RESIDENT}
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
import transformers.models.llama.modeling_llama
torch.ones(8, 8) @ torch.ones(8, 8)
before = resident()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2])).eval()
AutoTokenizer.from_pretrained(sys.argv[1])
with torch.no_grad():
    model.generate(ids(torch), max_new_tokens=8, do_sample=False)
print(json.dumps({{"all": resident(), "model": resident() - before}}))
"""


@dataclass
class ResidentSettings(Settings):
    """Settings of this benchmark; it measures the CPU."""

    model: str = "smollm2-135m"
    weights: str = "native"
    """Format of our weights."""
    dtype: str = "bfloat16"
    """Dtype of activations, and of transformers' weights."""


def main(settings: ResidentSettings) -> None:
    """Measure, and write the record."""
    from rap_env.llm.device import use_threads
    from rap_env.llm.loading import load_llm
    from rap_env.llm.sources import locate

    threads = use_threads(settings.threads or "auto")
    load_llm(settings.model, device="cpu", weights=settings.weights)  # downloads and converts it
    folder = str(locate(settings.model).folder)
    found: dict[str, dict[str, list[float]]] = {
        side: {"all": [], "model": []} for side in ("rap_env", "transformers")
    }
    for _ in range(settings.repeats):
        ours = _process(_OURS, [settings.model, settings.weights, settings.dtype], threads)
        peer = _process(_PEER, [folder, settings.dtype], threads)
        for side, values in (("rap_env", ours), ("transformers", peer)):
            for name, value in values.items():
                found[side][name].append(value)
    targets = [
        Target.of(
            f"times the resident memory, {words}",
            ratios(found["rap_env"][name], found["transformers"][name]),
            at_most=0.6,
            against=f"transformers, {settings.dtype}: "
            f"{spread(found['transformers'][name])['median'] / 2**20:,.0f} MiB",
        )
        for name, words in (("model", "beyond libraries"), ("all", "libraries included"))
    ]
    write_record(
        "resident",
        device="cpu",
        settings=settings,
        targets=targets,
        measured={
            side: {f"{name}_bytes": spread(values) for name, values in both.items()}
            for side, both in found.items()
        },
        notes=[
            "A fresh process each time; 64 tokens of prompt and 8 of answer; resident memory at "
            "the end, with pages of mapped files. Our libraries include the server's."
        ],
    )


def _process(code: str, arguments: list[str], threads: int) -> dict[str, Any]:
    """What `code` prints in a new Python process."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    values: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return values


if __name__ == "__main__":
    launch(ResidentSettings, main)
