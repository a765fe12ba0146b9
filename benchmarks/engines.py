"""Exported plans in other engines, beside our own runtime: ``python -m benchmarks.engines``.

Agreement: the model in float32 under several masks is exported; llama.cpp, and vLLM if
`vllm_python` names an environment that has it, must choose the same tokens as our masked model.
Time and memory: three plans and the dense model in llama.cpp and in our runtime, both with the
model's own GGUF file, and in vLLM, unquantised. Each plan runs in each engine in a process of its
own, one after the other, for several rounds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import ModelSettings, launch, open_model, ratios, spread
from benchmarks.record import Target, write_record
from experiments.ladder.llama_cpp import PACKAGE, gguf_file, need_llama_cpp
from experiments.ladder.llama_cpp_process import LlamaCpp, token_nll
from experiments.study.run_folder import package_versions
from rap_env.errors import UnsupportedModelError
from rap_env.export.gguf_export import export_gguf
from rap_env.export.gguf_model import GgufModel
from rap_env.models.files.loading import load_llm
from rap_env.models.files.pruned_checkpoint import save_pruned
from rap_env.models.files.vllm_config import vllm_entries
from rap_env.models.live.elastic import ElasticLLM
from rap_env.plan import Plan

_TEXTS = (
    "The garden behind the old house had not been tended for years, and the",
    "def mean(values):\n    total = 0\n    for value in values:\n        total +=",
    "In the north of the country winters are long and dark, so people there",
    "To bake bread at home you need only flour, water, salt and yeast. First",
    "A memory limit that moves is a problem for a server that holds a large",
    "The capital of France is Paris. The capital of Italy is Rome. The capital",
    "Question: How many legs do a spider and two cats have together? Answer:",
    "She opened the letter slowly, read the first line twice, and then began",
)
_PROCESS = str(Path(__file__).with_name("engine_process.py"))
_SAME_NLL = 1e-4


@dataclass
class EnginesSettings(ModelSettings):
    """Settings of this benchmark; its device is the CPU."""

    device: str = "cpu"
    dtype: str = "float32"
    """Of the models whose tokens are compared."""
    prompt_tokens: int = 12
    new_tokens: int = 48
    context_tokens: int = 512
    """Tokens of the prompt whose prefill is timed, and behind which decode steps are."""
    steps: int = 24
    """Decode steps of one measurement."""
    rounds: int = 3
    """Processes of each engine and plan, each with so many repeats."""
    vllm_python: str = ""
    """Python of an environment with vLLM; empty leaves vLLM out."""


def masks_of(num_layers: int) -> dict[str, Plan]:
    """The removed blocks by what they are, for a model of at least 4 layers."""
    last, middle = num_layers - 1, num_layers // 2
    ten = [(last - n, n % 2) for n in range(1, min(10, num_layers - 2) + 1)]
    named = {
        "attention": [(middle, 0), (middle + 1, 0)],
        "FFN": [(middle - 1, 1), (middle, 1)],
        "both": [(middle, 0), (middle, 1), (middle + 1, 0)],
        "first and last": [(0, 0), (last, 1)],
        "ten blocks": ten,
    }
    return {name: Plan.removing(*(2 * n + k for n, k in blocks)) for name, blocks in named.items()}


def served_masks(llm: ElasticLLM) -> dict[str, Plan]:
    """The plans whose time and memory are measured: nothing removed, and ten blocks in three ways.

    Those blocks are removed that cost least alone on the texts of the prompts; fewer of a small
    model. The first and the last layer are kept.
    """
    window = text_window(llm)
    layers = range(1, llm.adapter.num_layers - 1)

    def cheapest(kind: int, number: int) -> list[int]:
        indices = [2 * layer + kind for layer in layers]
        return sorted(indices, key=lambda i: _masked_nll(llm, Plan.removing(i), window))[:number]

    attention, ffn = cheapest(0, 10), cheapest(1, 10)
    return {
        "dense": Plan(),
        "five attention and five FFN blocks": Plan.removing(*attention[:5], *ffn[:5]),
        "ten attention blocks": Plan.removing(*attention),
        "ten FFN blocks": Plan.removing(*ffn),
    }


def text_window(llm: ElasticLLM) -> torch.Tensor:
    """All texts of the prompts as one sequence of token ids, (1, T)."""
    ids = llm.tokenizer(" ".join(_TEXTS)).input_ids[: llm.adapter.max_positions]
    return torch.tensor([ids])


def _masked_nll(llm: ElasticLLM, mask: Plan, window: torch.Tensor) -> float:
    with llm.masked(mask), torch.no_grad():
        return _nll(llm.model(window).logits[0].float().numpy(), window[0])


def main(settings: EnginesSettings) -> None:
    """Measure, and write the record."""
    need_llama_cpp()
    llm = open_model(settings)
    masks, source = masks_of(llm.adapter.num_layers), GgufModel.of_file(gguf_file(settings.model))
    with tempfile.TemporaryDirectory() as folder:
        agreement = _agreement(settings, llm, masks, Path(folder))
        plans, files, folders = served_masks(llm), {}, {}
        for name, mask in plans.items() if settings.vllm_python else ():
            folders[name] = save_pruned(llm, mask, Path(folder, name))
        del llm
        for name, mask in plans.items():
            files[name] = Path(folder, f"{name}.gguf")
            export_gguf(source, mask, files[name])
        packed = load_llm(settings.model, device="cpu", dtype=settings.dtype, weights="native")
        quantised = _quantised(settings, packed, plans, files)
        del packed
        serving = _serving(settings, plans, files, folders)
    _write(settings, agreement, quantised, serving)


def prompts_of(settings: EnginesSettings, llm: ElasticLLM) -> torch.Tensor:
    """Token ids of prompts of one length, (prompts, prompt_tokens)."""
    found = [llm.tokenizer(text).input_ids[: settings.prompt_tokens] for text in _TEXTS]
    return torch.tensor(found)


def _agreement(
    settings: EnginesSettings, llm: ElasticLLM, masks: Mapping[str, Plan], folder: Path
) -> dict[str, dict[str, Any]]:
    """Equal prompts and the largest difference in NLL, by engine and mask."""
    prompts, model = prompts_of(settings, llm), GgufModel.of_llm(llm)
    found: dict[str, dict[str, Any]] = {"llama.cpp": {}}
    if settings.vllm_python:
        found["vLLM"] = {}
    for name, mask in masks.items():
        with llm.masked(mask), torch.no_grad():
            ours = llm.generate(
                prompts, max_new_tokens=settings.new_tokens, do_sample=False, eos_token_id=None
            )
            nll = [_nll(llm.model(row[None]).logits[0].numpy(), row) for row in ours]
        path = folder / "agreement.gguf"
        export_gguf(model, mask, path)
        theirs = _llama_cpp_choices(path, ours, settings)
        found["llama.cpp"][name] = _compared(ours, nll, *theirs, settings)
        if settings.vllm_python:
            found["vLLM"][name] = _vllm(settings, llm, mask, (ours, nll), folder / "vllm")
    return found


def _nll(logits: Any, ids: torch.Tensor) -> float:
    return float(token_nll(logits[:-1], ids[1:].numpy().astype(np.int32)).mean())


def _llama_cpp_choices(
    path: Path, ours: torch.Tensor, settings: EnginesSettings
) -> tuple[list[list[int]], list[float]]:
    """The token that llama.cpp chooses after each prefix of our sequences, and their NLL.

    If all choices are ours, greedy generation gives our tokens.
    """
    engine = LlamaCpp(str(path), "f32", 1, ours.shape[1] + 1, settings.threads or 1)
    tokens, nll = [], []
    for row in ours:
        engine.clear()
        logits = engine.decode(row.numpy().astype(np.int32), 0, all_logits=True).copy()
        tokens.append(logits[settings.prompt_tokens - 1 : -1].argmax(axis=1).tolist())
        nll.append(_nll(logits, row))
    engine.close()
    return tokens, nll


def _vllm(
    settings: EnginesSettings,
    llm: ElasticLLM,
    mask: Plan,
    ours: tuple[torch.Tensor, list[float]],
    folder: Path,
) -> dict[str, Any]:
    """The comparison with vLLM, or the reason why it cannot serve the mask."""
    try:
        vllm_entries(llm.adapter, mask, stubs=False)
    except UnsupportedModelError as error:
        return {"refused": str(error)}
    task = {
        "folder": str(save_pruned(llm, mask, folder)),
        "dtype": settings.dtype,
        "sequences": ours[0].tolist(),
        "prompt_tokens": settings.prompt_tokens,
    }
    answer = _answer(settings.vllm_python, task)
    compared = _compared(*ours, answer["tokens"], answer["nll"], settings)
    return {**compared, "version": answer["version"]}


def _compared(
    ours: torch.Tensor,
    nll: list[float],
    tokens: list[list[int]],
    their_nll: list[float],
    settings: EnginesSettings,
) -> dict[str, Any]:
    new = ours[:, settings.prompt_tokens :].tolist()
    return {
        "prompts": len(new),
        "equal_prompts": sum(a == b for a, b in zip(new, tokens, strict=True)),
        "nll_apart": max(abs(a - b) for a, b in zip(nll, their_nll, strict=True)),
    }


def _quantised(
    settings: EnginesSettings,
    packed: ElasticLLM,
    plans: Mapping[str, Plan],
    files: Mapping[str, Path],
) -> dict[str, float]:
    """NLL in llama.cpp minus ours under each plan, both from the quantised file."""
    window, found = text_window(packed), {}
    for name, mask in plans.items():
        engine = LlamaCpp(str(files[name]), "f32", 1, window.shape[1], settings.threads or 1)
        theirs = engine.nll(window[0].numpy().astype(np.int32))
        found[name] = theirs - _masked_nll(packed, mask, window)
        engine.close()
    return found


def _serving(
    settings: EnginesSettings,
    plans: Mapping[str, Plan],
    files: Mapping[str, Path],
    folders: Mapping[str, Path],
) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Seconds and bytes of each plan in each engine: every one a process of its own, in turn.

    Args:
        settings: Settings of the benchmark.
        plans: Masks by name.
        files: The GGUF file of each.
        folders: The folder for vLLM of each; empty without vLLM.
    """
    names = ("context_tokens", "steps", "repeats")
    common = {name: getattr(settings, name) for name in names}
    common["threads"] = settings.threads or 1
    measured: dict[str, dict[str, dict[str, list[float]]]] = {}
    for _ in range(settings.rounds):
        for name, mask in plans.items():
            own = {"model": settings.model, "weights": "native", "removed": list(mask.removed)}
            tasks: dict[str, dict[str, Any]] = {"llama.cpp": {"file": str(files[name])}, "own": own}
            if folders:
                tasks["vLLM"] = {"folder": str(folders[name]), "dtype": settings.dtype}
            for engine, task in tasks.items():
                python = settings.vllm_python if engine == "vLLM" else sys.executable
                answer = _answer(python, {**common, **task, "engine": engine})
                times = measured.setdefault(engine, {}).setdefault(name, {})
                for what, value in answer.items():
                    times.setdefault(what, []).extend(value if isinstance(value, list) else [value])
    return measured


def _answer(python: str, task: Mapping[str, Any]) -> Any:
    """What `benchmarks.engine_process` answers to a task."""
    threads = str(task.get("threads", 1))
    done = subprocess.run(
        [python, _PROCESS],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        check=True,
        env={
            **os.environ,
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "PYTHONPATH": os.pathsep.join(sys.path) if python == sys.executable else "",
        },
    )
    return json.loads(done.stdout.splitlines()[-1])


def _write(
    settings: EnginesSettings,
    agreement: Mapping[str, Mapping[str, Any]],
    quantised: Mapping[str, float],
    serving: Mapping[str, Mapping[str, Mapping[str, list[float]]]],
) -> None:
    targets = []
    for engine, cells in agreement.items():
        ran = [cell for cell in cells.values() if "refused" not in cell]
        equal, prompts = (sum(cell[k] for cell in ran) for k in ("equal_prompts", "prompts"))
        case = f"{prompts} prompts under {len(ran)} masks, float32"
        what = f"{engine}: prompts whose {settings.new_tokens} tokens are ours"
        apart = max(cell["nll_apart"] for cell in ran)
        targets += [
            Target(what, prompts, None, equal, case),
            Target(f"{engine}: nats/token apart, at worst", None, _SAME_NLL, apart, case),
        ]
    plans = serving["llama.cpp"]
    ten = plans["five attention and five FFN blocks"]
    faster = ratios(ten["decode_s"], plans["dense"]["decode_s"])
    worst = max(map(abs, quantised.values()))
    file = "the model's own GGUF file"
    targets += [
        Target("llama.cpp: nats/token apart from our plan", None, 0.01, worst, file),
        Target.of(
            "llama.cpp: decode time without ten blocks", faster, at_most=0.95, against="dense"
        ),
    ]
    spreads = {
        engine: {
            name: {what: spread(values) for what, values in found.items()}
            for name, found in sides.items()
        }
        for engine, sides in serving.items()
    }
    measured = {
        "agreement": agreement,
        "quantised_nll_apart": quantised,
        "serving": spreads,
        "llama_cpp": package_versions([PACKAGE]).get(PACKAGE),
    }
    write_record(
        "engines",
        device="cpu",
        settings=replace(settings, vllm_python=Path(settings.vllm_python).name),
        targets=targets,
        measured=measured,
        notes=[
            f"serving: seconds of the prefill of {settings.context_tokens} tokens and of "
            f"{settings.steps} decode steps behind them, and resident memory, with pages of mapped "
            "files; library_bytes is what was resident before the model was opened.",
            "llama.cpp and our runtime have the weights of the model's own file; vLLM has them in "
            f"{settings.dtype}, and 1 GiB for its KV cache.",
        ],
    )


if __name__ == "__main__":
    launch(EnginesSettings, main)
