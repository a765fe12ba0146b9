"""Predicted bytes against measured bytes: ``python -m benchmarks.memory``.

For each mask a checkpoint without the blocks is saved and loaded (`save_pruned`, `load_pruned`).
Then a prompt is prefilled in chunks, as `MemoryModel` assumes, and a few tokens are generated,
while torch's allocator reports each allocation.
"""

from __future__ import annotations

import gc
import random
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring import ModelSettings, measured_peak, open_model, spread
from benchmarks.record import Target, write_record
from experiments.config.common import parse_shape
from experiments.study.console import run_with_settings
from rap_env.errors import InvalidRequestError
from rap_env.memory import PREFILL_CHUNK_TOKENS, MemoryModel
from rap_env.models.caches.kv_cache import cache_argument
from rap_env.models.files.pruned_checkpoint import load_pruned, save_pruned
from rap_env.models.live.elastic import ElasticLLM
from rap_env.plan import Plan
from rap_env.request import Request

_TOLERATED_PERCENT = {"cpu": 10.0, "cuda": 5.0}


@dataclass
class MemorySettings(ModelSettings):
    """Settings of this benchmark; `repeats` has no effect, since bytes do not vary."""

    requests: list[str] = field(default_factory=lambda: ["1x128", "1x1024", "4x1024", "8x2048"])
    """Batch size x tokens of prompt and answer."""
    share: float = 0.3
    """Share of the blocks that the masks remove."""
    steps: int = 4
    """Tokens of the answer."""


def masks_of(num_blocks: int, share: float) -> dict[str, Plan]:
    """The dense model, and masks of random blocks of both kinds and of either kind."""
    drawn = random.Random(0).sample(range(num_blocks), num_blocks)
    count = round(share * num_blocks)
    kinds = {"even": drawn, "attn": [i for i in drawn if i % 2 == 0]}
    kinds["ffn"] = [i for i in drawn if i % 2]
    return {"dense": Plan()} | {n: Plan.removing(*some[:count]) for n, some in kinds.items()}


def main(settings: MemorySettings) -> None:
    """Measure, and write the record."""
    llm = open_model(settings)
    memory, device = MemoryModel(llm), llm.device
    masks = masks_of(llm.num_blocks, settings.share)
    cells: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, mask in masks.items():
            save_pruned(llm, mask, Path(folder, name))
        del llm
        gc.collect()
        for name, mask in masks.items():
            pruned = load_pruned(Path(folder, name), device=str(device))
            for text in settings.requests:
                request = Request(*parse_shape(text), budget_bytes=2**62)
                cells[f"{name} {text}"] = {
                    "blocks_removed": len(mask.removed),
                    **_compared(memory, mask, request, measure(pruned, request, settings.steps)),
                }
            del pruned
            gc.collect()

    def worst(key: str) -> float:
        return float(max(abs(cell[key]) for cell in cells.values()))

    cases, tolerated = f"{len(cells)} masks and requests", _TOLERATED_PERCENT[device.type]
    write_record(
        "memory",
        device=str(device),
        settings=settings,
        targets=[
            Target("bytes off in weights", None, 0.0, worst("weights_off_bytes"), cases),
            Target("bytes off in the KV cache", None, 0.0, worst("kv_cache_off_bytes"), cases),
            Target("% off in the peak, at worst", None, tolerated, worst("peak_off_%"), cases),
        ],
        measured={
            "peak_off_percent": spread([abs(cell["peak_off_%"]) for cell in cells.values()]),
            "cells": cells,
        },
        notes=["The peak is of all tensors, temporary ones in operations included."],
    )


@torch.no_grad()
def measure(pruned: ElasticLLM, request: Request, steps: int) -> dict[str, int]:
    """Bytes that a model without the removed blocks holds while it serves a request.

    Args:
        pruned: The model.
        request: The request; its budget has no effect.
        steps: Number of its tokens that are generated one by one.

    Returns:
        ``weights_bytes``, ``kv_cache_bytes`` (of kept attn blocks) and ``peak_bytes``.
    """
    from transformers import DynamicCache

    if request.seq_len_tokens <= steps:
        raise InvalidRequestError(
            f"A request must be longer than its answer of {steps} tokens (the setting steps), not "
            f"{request.seq_len_tokens} tokens."
        )
    tensors = pruned.model.state_dict(keep_vars=True).values()
    weights = sum({id(tensor): tensor.nbytes for tensor in tensors}.values())
    chunk = max(1, PREFILL_CHUNK_TOKENS // request.batch_size)
    ids = torch.ones(request.batch_size, request.seq_len_tokens, dtype=torch.long)
    parts = [*torch.split(ids[:, :-steps], chunk, 1), *torch.split(ids[:, -steps:], 1, 1)]
    with measured_peak(pruned.device) as measured:
        cache: Any = DynamicCache(config=pruned.model.config)
        for part in parts:
            pruned.model(
                input_ids=part.to(pruned.device),
                use_cache=True,
                logits_to_keep=1,
                **{cache_argument(pruned.model): cache},
            )
    kept = (layer for n, layer in enumerate(cache.layers) if 2 * n not in pruned.pruned.removed)
    return {
        "weights_bytes": weights,
        "kv_cache_bytes": sum(layer.keys.nbytes + layer.values.nbytes for layer in kept),
        "peak_bytes": weights + measured.peak_bytes,
    }


def _compared(
    memory: MemoryModel, mask: Plan, request: Request, measured: dict[str, int]
) -> dict[str, Any]:
    """Measured and predicted bytes, and how far they are apart."""
    predicted = memory.breakdown(mask, request)
    weights = predicted.weights + predicted.embeddings
    return {
        **measured,
        "predicted_peak_bytes": predicted.peak,
        "weights_off_bytes": weights - measured["weights_bytes"],
        "kv_cache_off_bytes": predicted.kv_cache - measured["kv_cache_bytes"],
        "peak_off_%": 100 * (predicted.peak / measured["peak_bytes"] - 1),
    }


if __name__ == "__main__":
    run_with_settings(MemorySettings, main)
