"""``python -m experiments.ladder.second_model TEXT``: what each level costs a second real model.

Gemma 3 270M comes in 5 to 8 bits, so int4 is not free for it. All plans are uniform. Each window
begins with the start token, as the model was trained. TEXT is JSON lines with the field ``page``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from experiments.console import say
from experiments.study.run_folder import git_state
from rap_env.artifacts import load_artifact, save_artifact
from rap_env.blocks import BlockMask
from rap_env.levels import WeightLevel
from rap_env.memory import MemoryModel
from rap_env.models.files.loading import load_llm
from rap_env.models.live.calibration import calibrate
from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.live.self_written import self_written
from rap_env.models.weights.packing import PACKED_LEVELS, PackedLevel
from rap_env.models.weights.quantisers import Quantiser, quantise, round_to_nearest
from rap_env.plan import CompressionPlan
from rap_env.scoring.scorer import MaskScorer

KIND, VERSION = "costs of levels", 1
TOKENS = 512
CALIBRATION = (16, 256)  # sequences, tokens


@click.command(help=__doc__)
@click.argument("text", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--model", default="gemma3-270m", show_default=True)
@click.option("--windows", default=8, show_default=True, help="Windows of 512 tokens.")
@click.option("--threads", default=1, show_default=True)
@click.option("--out", default="results/ladder/gemma3-270m.json", type=click.Path(path_type=Path))
def main(text: Path, model: str, windows: int, threads: int, out: Path) -> None:
    """Measure all rows; the file is written after each."""
    torch.set_num_threads(threads)
    llm = load_llm(model, dtype="bfloat16", weights="bf16")
    tokens = _windows(llm, text, windows)
    dense = MaskScorer(llm, tokens).window_nll(BlockMask())
    rows: list[dict[str, Any]] = []
    body = {
        "model": llm.name,
        "fingerprint": llm.facts.fingerprint,
        "dtype": llm.facts.dtype,
        "text": "/".join(text.parts[-2:]),
        "text_sha256": hashlib.sha256(text.read_bytes()).hexdigest(),
        "windows": windows,
        "window_tokens": TOKENS,
        "nll": float(dense.mean()),
        "command": f"python -m experiments.ladder.second_model TEXT --windows {windows}",
        "git": git_state(),
        "rows": rows,
    }

    rows += _known_rows(out, body)

    def record(items: str, level: str, how: str, measure: Measure) -> None:
        if any((r["items"], r["level"], r["quantiser"]) == (items, level, how) for r in rows):
            return
        nll, size = measure()
        delta = nll - dense
        error = float(delta.std(ddof=1) / len(delta) ** 0.5)
        row = {"items": items, "level": level, "quantiser": how, "delta_nll": float(delta.mean())}
        rows.append({**row, "standard_error": error, "bytes": size})
        out.parent.mkdir(parents=True, exist_ok=True)
        save_artifact(out, KIND, VERSION, body)
        say(f"{items} at {level}{f' by {how}' if how else ''}: {delta.mean():+.4f} ({error:.4f})")

    def native() -> tuple[npt.NDArray[np.float64], int]:
        packed = load_llm(model, dtype="bfloat16")
        return MaskScorer(packed, tokens).window_nll(BlockMask()), packed.held_bytes.weights

    say(f"{llm.name} in bfloat16: {dense.mean():.4f} nats per token")
    _weights(llm, tokens, record)
    _levels(llm, tokens, record)
    record("the whole model", "native", "the file's own", native)
    _calibrated(llm, tokens, record)


Measure = Callable[[], tuple[npt.NDArray[np.float64], int]]
"""Returns the NLL of each window, and the bytes of the items."""

Record = Callable[[str, str, str, Measure], None]


def _windows(llm: ElasticLLM, text: Path, windows: int) -> torch.Tensor:
    """The first windows of the text, (windows, 512), each behind the start token."""
    pages = [json.loads(line)["page"] for line in text.read_text(encoding="utf-8").splitlines()]
    ids = llm.tokenizer("\n\n".join(pages), add_special_tokens=False, verbose=False)["input_ids"]
    found = torch.tensor(ids[: windows * (TOKENS - 1)]).view(windows, -1)
    start = torch.full((windows, 1), llm.tokenizer.bos_token_id)
    return torch.cat((start, found), dim=1)


def _known_rows(path: Path, body: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows that an earlier run measured on the same model and text."""
    if not path.is_file():
        return []
    found = load_artifact(path, KIND, VERSION)
    same = all(
        found[key] == body[key] for key in ("fingerprint", "dtype", "text_sha256", "windows")
    )
    return list(found["rows"]) if same else []


def _weights(llm: ElasticLLM, tokens: torch.Tensor, record: Record) -> None:
    """All blocks at a level by simple quantisers; the model has its own weights afterwards."""
    layers = {
        name: module
        for name, module in llm.adapter.layers(llm.model).named_modules()
        if isinstance(module, nn.Linear)
    }
    originals = {name: layer.weight for name, layer in layers.items()}

    def measured(pack: Quantiser, level: PackedLevel) -> tuple[npt.NDArray[np.float64], int]:
        size = 0
        for name, layer in layers.items():
            matrix = pack(originals[name], level)
            size += matrix.nbytes
            layer.weight = nn.Parameter(matrix.widened(originals[name].dtype), requires_grad=False)
        nll = MaskScorer(llm, tokens).window_nll(BlockMask())
        for name, layer in layers.items():
            layer.weight = originals[name]
        return nll, size

    ways: tuple[tuple[PackedLevel, str, Quantiser], ...] = (
        ("int4", "rounding to nearest", round_to_nearest),
        ("int4", "search of scales", quantise),
        ("int8", "rounding to nearest", quantise),
    )
    for level, how, pack in ways:
        record("weights of all blocks", level, how, partial(measured, pack, level))


def _levels(llm: ElasticLLM, tokens: torch.Tensor, record: Record) -> None:
    """All caches, and embeddings with head, at each level."""
    scorer, layers, memory = MaskScorer(llm, tokens), llm.adapter.num_layers, MemoryModel(llm)

    def caches(plan: CompressionPlan) -> tuple[npt.NDArray[np.float64], int]:
        parts = (memory.cache_bytes(level, layer, 1, TOKENS) for layer, level in plan.caches)
        return scorer.window_nll(plan), sum(parts)

    def embeddings(level: WeightLevel) -> tuple[npt.NDArray[np.float64], int]:
        nll = scorer.window_nll(CompressionPlan(embeddings=level))
        return nll, llm.facts.embedding_levels[level]

    for name in ("int8", "int4", "int2"):
        plan = CompressionPlan.uniform(layers, caches=name)
        record("all caches", name, "", partial(caches, plan))
    for level in PACKED_LEVELS:
        record("embeddings", level, "search of scales", partial(embeddings, level))


def _calibrated(llm: ElasticLLM, tokens: torch.Tensor, record: Record) -> None:
    """All blocks at int4 by GPTQ, with text that the model writes."""

    def measured() -> tuple[npt.NDArray[np.float64], int]:
        text = self_written(llm, *CALIBRATION, seed=0)
        start = torch.full((len(text), 1), llm.tokenizer.bos_token_id)
        calibrate(llm, torch.cat((start, text), dim=1))
        plan = CompressionPlan.uniform(llm.adapter.num_layers, weights="int4")
        size = sum(llm.facts.weight_levels(index)["int4"] for index in range(llm.num_blocks))
        return MaskScorer(llm, tokens).window_nll(plan), size

    record("weights of all blocks", "int4", "GPTQ", measured)


if __name__ == "__main__":
    main()
