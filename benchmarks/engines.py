"""Exported plans in other engines beside our own masked model: ``python -m benchmarks.engines``.

The model in float32 under several masks is exported; llama.cpp, and vLLM if `vllm_python` names an
environment that has it, must choose the same tokens as our masked model.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind

from benchmarks.measuring import ModelSettings, open_model
from benchmarks.record import Target, write_record
from experiments.llama_cpp import PACKAGE, LlamaCpp, need_llama_cpp, target_nll
from experiments.study.console import run_with_settings
from experiments.study.run_folder import package_versions
from rap_env.errors import UnsupportedModelError
from rap_env.export.gguf_export import GgufModel, export_gguf
from rap_env.export.gguf_tensors import GgufTensor
from rap_env.models.files.pruned_checkpoint import save_pruned
from rap_env.models.files.pruned_code import vllm_entries
from rap_env.models.files.sources import gguf_source
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
_VLLM_PROGRAM = Path(__file__).with_name("vllm_choices.py")
_SAME_NLL = 1e-4


@dataclass
class EnginesSettings(ModelSettings):
    """Settings of this benchmark; its device is the CPU."""

    device: str = "cpu"
    dtype: str = "float32"
    prompt_tokens: int = 12
    new_tokens: int = 48
    vllm_python: str = ""
    """Python of an environment with vLLM; empty leaves vLLM out."""


@dataclass(frozen=True)
class Sequences:
    """Prompts with the tokens that our masked model chooses, and the NLL of each.

    Attributes:
        ids: Token ids, (sequences, prompt_tokens + new_tokens).
        nll: Nats per token of each sequence.
        prompt_tokens: Tokens of each prompt.
    """

    ids: torch.Tensor
    nll: list[float]
    prompt_tokens: int

    def compared(self, tokens: list[list[int]], nll: list[float]) -> dict[str, Any]:
        """How many prompts have the same tokens in another engine, and how far the NLL is apart."""
        own = self.ids[:, self.prompt_tokens :].tolist()
        return {
            "prompts": len(own),
            "equal_prompts": sum(a == b for a, b in zip(own, tokens, strict=True)),
            "nll_apart": max(abs(a - b) for a, b in zip(self.nll, nll, strict=True)),
        }


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


def main(settings: EnginesSettings) -> None:
    """Measure, and write the record."""
    need_llama_cpp()
    source = gguf_source(settings.model)
    if source is None:
        raise SystemExit(f"{settings.model} comes from no GGUF file, which llama.cpp needs.")
    llm, exported = open_model(settings), unquantised(GgufModel.of_file(source))
    agreement: dict[str, dict[str, Any]] = {"llama.cpp": {}}
    if settings.vllm_python:
        agreement["vLLM"] = {}
    for name, mask in masks_of(llm.adapter.num_layers).items():
        ours = _our_choices(settings, llm, mask)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "agreement.gguf"
            export_gguf(exported, mask, path)
            agreement["llama.cpp"][name] = _in_llama_cpp(settings, path, ours)
            if settings.vllm_python:
                agreement["vLLM"][name] = _in_vllm(settings, llm, mask, ours, Path(folder))
    targets = []
    for engine, cells in agreement.items():
        served = [cell for cell in cells.values() if "refused" not in cell]
        equal, prompts = (sum(cell[k] for cell in served) for k in ("equal_prompts", "prompts"))
        case = f"{prompts} prompts under {len(served)} masks, float32"
        what = f"{engine}: prompts whose {settings.new_tokens} tokens are ours"
        apart = max(cell["nll_apart"] for cell in served)
        targets += [
            Target(what, prompts, None, equal, case),
            Target(f"{engine}: nats/token apart, at worst", None, _SAME_NLL, apart, case),
        ]
    write_record(
        "engines",
        device="cpu",
        settings=replace(settings, vllm_python=Path(settings.vllm_python).name),
        targets=targets,
        measured={"agreement": agreement, "llama_cpp": package_versions([PACKAGE]).get(PACKAGE)},
    )


def _our_choices(settings: EnginesSettings, llm: ElasticLLM, mask: Plan) -> Sequences:
    prompts = [llm.tokenizer(text).input_ids[: settings.prompt_tokens] for text in _TEXTS]
    with llm.masked(mask), torch.no_grad():
        ids = llm.generate(
            torch.tensor(prompts),
            max_new_tokens=settings.new_tokens,
            do_sample=False,
            eos_token_id=None,
        )
        nll = [_nll(llm.model(row[None]).logits[0].numpy(), row) for row in ids]
    return Sequences(ids, nll, settings.prompt_tokens)


def _nll(logits: Any, ids: torch.Tensor) -> float:
    return float(target_nll(logits[:-1], ids[1:].numpy().astype(np.int32)).mean())


def unquantised(model: GgufModel) -> GgufModel:
    """The model with all tensors in float32, in which both engines compute."""
    tensors = {n: GgufTensor(t.values(), Kind.F32) for n, t in model.tensors.items()}
    return replace(model, tensors=tensors)


def _in_llama_cpp(settings: EnginesSettings, path: Path, ours: Sequences) -> dict[str, Any]:
    """The comparison with the token that llama.cpp chooses after each prefix of our sequences.

    If all choices are ours, greedy generation gives our tokens.
    """
    engine = LlamaCpp(str(path), "f32", 1, ours.ids.shape[1] + 1, settings.threads or 1)
    tokens, nll = [], []
    for row in ours.ids:
        engine.clear()
        logits = engine.decode(row.numpy().astype(np.int32), 0, all_logits=True).copy()
        tokens.append(logits[settings.prompt_tokens - 1 : -1].argmax(axis=1).tolist())
        nll.append(_nll(logits, row))
    engine.close()
    return ours.compared(tokens, nll)


def _in_vllm(
    settings: EnginesSettings, llm: ElasticLLM, mask: Plan, ours: Sequences, folder: Path
) -> dict[str, Any]:
    """The comparison with vLLM, or the reason why it cannot serve the mask."""
    try:
        vllm_entries(llm.adapter, mask)
    except UnsupportedModelError as error:
        return {"refused": str(error)}
    task = {
        "folder": str(save_pruned(llm, mask, folder / "vllm")),
        "dtype": settings.dtype,
        "sequences": ours.ids.tolist(),
        "prompt_tokens": settings.prompt_tokens,
    }
    done = subprocess.run(
        [settings.vllm_python, str(_VLLM_PROGRAM)],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": str(settings.threads or 1)},
    )
    answer = json.loads(done.stdout.splitlines()[-1])
    compared = ours.compared(answer["tokens"], answer["nll"])
    return {**compared, "version": answer["version"]}


if __name__ == "__main__":
    run_with_settings(EnginesSettings, main)
