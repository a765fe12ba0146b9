"""Resident memory of a process that serves: ``python -m benchmarks.resident``.

It is compared with transformers in a process with the same libraries for a server. Each measurement
starts a Python process that loads the model and generates a few tokens. Its resident memory is
reported in all and beyond the libraries: both sides first import every module that such a process
has in the end, so that what is imported while a model is loaded does not count as the model's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.harness import Settings, Target, launch, ratios, spread
from benchmarks.record import write_record

_IMPORTS = {
    "rap_env": "import torch, rap_env.serving.server, rap_env.serving.stack",
    "transformers": "import torch, fastapi, uvicorn\n"
    "from transformers import AutoModelForCausalLM, AutoTokenizer",
}
_TOKENIZERS = {
    "rap_env": """
from pathlib import Path
from rap_env.models.device import return_freed_memory
from rap_env.models.files.sources import load_tokenizer
tokenizer = load_tokenizer(Path(given["packed_folder"]))
return_freed_memory()  # as load_llm does
""",
    "transformers": """
tokenizer = AutoTokenizer.from_pretrained(given["folder"])
""",
}
_SETTINGS = """
from rap_env.models.device import return_freed_memory
from rap_env.models.live.live_batch import LiveBatch
from rap_env.serving.settings import ServerSettings
from rap_env.serving.stack import build_stack, load_served_model
settings = ServerSettings(
    model=given["model"], weights=given["weights"], dtype=given["dtype"], device="cpu"
)
"""
_SERVERS = {"rap_env": f"{_SETTINGS}\nstack = build_stack(settings)"}
_MODELS = {
    "rap_env": f"""{_SETTINGS}
llm = load_served_model(settings)
batch = LiveBatch(llm)
logits = batch.prefill(prompt.tolist())
for _ in range(7):
    logits = batch.extend(logits.argmax(dim=-1).tolist())
return_freed_memory()  # as the server does while it is idle
""",
    "transformers": """
model = AutoModelForCausalLM.from_pretrained(
    given["folder"], dtype=getattr(torch, given["dtype"])
).eval()
tokenizer = AutoTokenizer.from_pretrained(given["folder"])
with torch.no_grad():
    model.generate(prompt, max_new_tokens=8, do_sample=False)
""",
}
_PROCESS = """
import contextlib, importlib, json, sys
def resident_bytes():
    with open("/proc/self/status", encoding="utf-8") as file:
        return int(file.read().partition("VmRSS:")[2].split()[0]) * 1024
given = json.load(sys.stdin)
{imports}
for name in given["modules"]:
    with contextlib.suppress(Exception):
        importlib.import_module(name)
torch.ones(8, 8) @ torch.ones(8, 8)
prompt = torch.arange(64)[None] % 32 + 4
before = resident_bytes()
{load}
print(json.dumps({{"all": resident_bytes(), "libraries": before, "modules": list(sys.modules)}}))
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
    from rap_env.models.device import use_threads
    from rap_env.models.files.loading import load_llm
    from rap_env.models.files.sources import locate

    threads = use_threads(settings.threads or "auto")
    given: dict[str, Any] = {
        "model": settings.model,
        "weights": settings.weights,
        "dtype": settings.dtype,
    }
    llm = load_llm(settings.model, device="cpu", weights=settings.weights)  # downloads, converts
    given["packed_folder"] = str(llm.folder)
    given["folder"] = str(locate(settings.model).folder)
    found: dict[str, dict[str, list[float]]] = {
        side: {name: [] for name in ("all", "libraries", "tokenizer", "model")} for side in _IMPORTS
    }
    modules = {
        side: _process(side, _MODELS, {**given, "modules": []}, threads)["modules"]
        for side in _IMPORTS
    }
    server: list[float] = []
    for _ in range(settings.repeats):
        task = {**given, "modules": modules["rap_env"]}
        server.append(_process("rap_env", _SERVERS, task, threads)["all"])
        for side, values in found.items():
            task = {**given, "modules": modules[side]}
            whole = _process(side, _MODELS, task, threads)
            read = _process(side, _TOKENIZERS, task, threads)
            tokenizer = read["all"] - read["libraries"]
            values["all"].append(whole["all"])
            values["libraries"].append(whole["libraries"])
            values["tokenizer"].append(tokenizer)
            values["model"].append(whole["all"] - whole["libraries"] - tokenizer)
    beyond = {
        side: [all_ - libraries for all_, libraries in zip(v["all"], v["libraries"], strict=True)]
        for side, v in found.items()
    }
    everything = {side: values["all"] for side, values in found.items()}
    targets = [
        Target.of(
            f"times the resident memory, {words}",
            ratios(values["rap_env"], values["transformers"]),
            at_most=0.6,
            against=f"transformers, {settings.dtype}: "
            f"{spread(values['transformers'])['median'] / 2**20:,.0f} MiB",
        )
        for values, words in ((beyond, "beyond libraries"), (everything, "libraries included"))
    ]
    write_record(
        "resident",
        device="cpu",
        settings=settings,
        targets=targets,
        measured={
            side: {f"{name}_bytes": spread(values) for name, values in parts.items()}
            for side, parts in found.items()
        }
        | {"rap_env_server": {"all_bytes": spread(server)}},
        notes=[
            "A fresh process each time; 64 tokens of prompt and 8 of answer; resident memory at "
            "the end, with pages of mapped files.",
            "Libraries: every module that the process has in the end, imported before the first "
            "reading. Both sides have fastapi and uvicorn; ours is the server's own model and "
            "batch, which returns freed memory as an idle server does, theirs is `generate`.",
            "The tokenizer is measured in a process of its own; the model is what remains, with "
            "the KV cache and the memory of the first passes.",
            "rap_env_server: `rap serve` before its first request, with policy, controller and "
            "application, after a pass of 256 tokens.",
        ],
    )


def _process(side: str, load: Mapping[str, str], given: dict[str, Any], threads: int) -> Any:
    """What a new Python process of a side reports after it has loaded something."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    code = _PROCESS.format(imports=_IMPORTS[side], load=load[side])
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(given),
        check=True,
        env=environment,
        capture_output=True,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    launch(ResidentSettings, main)
