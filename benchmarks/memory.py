"""Predicted bytes against measured bytes: ``python -m benchmarks.memory``.

For each mask a checkpoint without the blocks is saved and loaded (`save_pruned`, `load_pruned`).
Then a prompt is prefilled in chunks, as `MemoryModel` assumes, and a few tokens are generated,
while torch's allocator reports each allocation.
"""

from __future__ import annotations

import gc
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.decode_step import ORDERS, Decoding, MemoryTraffic
from benchmarks.record import write_record
from rap_env.blocks import BlockMask
from rap_env.errors import InvalidRequestError
from rap_env.memory import MemoryModel
from rap_env.models.files.pruned_checkpoint import load_pruned, save_pruned
from rap_env.models.live.elastic import ElasticLLM
from rap_env.request import Request

_TOLERATED = {"cpu": 0.10, "cuda": 0.05}


@dataclass
class MemorySettings(harness.ModelSettings):
    """Settings of this benchmark; `repeats` has no effect, since bytes do not vary."""

    requests: list[str] = field(default_factory=lambda: ["1x128", "1x1024", "4x1024", "8x2048"])
    """Batch size x tokens of prompt and answer."""
    share: float = 0.3
    """Share of the bytes of a decode step that the masks remove."""
    steps: int = 4
    """Tokens of the answer."""


def main(settings: MemorySettings) -> None:
    """Measure, and write the record."""
    llm = harness.open_model(settings)
    memory, device, traffic = MemoryModel(llm), str(llm.device), MemoryTraffic(llm, 512)
    masks = {"dense": BlockMask()}
    masks |= {order: traffic.mask(order, settings.share) for order in ORDERS}
    cells: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, mask in masks.items():
            save_pruned(llm, mask, Path(folder, name))
        del llm, traffic
        gc.collect()
        for name, mask in masks.items():
            pruned = load_pruned(Path(folder, name), device=device)
            for text in settings.requests:
                predicted = memory.breakdown(mask, _request(text)).as_dict()
                found = measure(pruned, _request(text), settings.steps)
                cells[f"{name} {text}"] = _cell(mask, predicted, found)
            del pruned
            gc.collect()
    _write(settings, device, cells, memory.facts.dtype)


def measure(pruned: ElasticLLM, request: Request, steps: int) -> dict[str, int]:
    """Bytes that a model without the removed blocks holds while it serves a request.

    Args:
        pruned: The model.
        request: The request; its budget has no effect.
        steps: Number of its tokens that are generated one by one.

    Returns:
        ``weights_bytes``, ``kv_cache_bytes`` (of kept attn blocks) and ``peak_bytes``.
    """
    if request.seq_len_tokens <= steps:
        raise InvalidRequestError(
            f"A request must be longer than its answer of {steps} tokens (the setting steps), not "
            f"{request.seq_len_tokens} tokens."
        )
    tensors = pruned.model.state_dict(keep_vars=True).values()
    weights = sum({id(tensor): tensor.nbytes for tensor in tensors}.values())
    with harness.measured_peak(pruned.device) as measured:
        decoding = Decoding(pruned, BlockMask(), request.batch_size, request.seq_len_tokens - steps)
        decoding.steps(steps)
    return {
        "weights_bytes": weights,
        "kv_cache_bytes": decoding.kv_bytes(),
        "peak_bytes": weights + measured.peak_bytes,
    }


def _request(text: str) -> Request:
    return Request(*harness.parse_request(text), budget_bytes=2**62)


def _cell(mask: BlockMask, predicted: dict[str, int], found: dict[str, int]) -> dict[str, Any]:
    """Predicted and measured bytes of one mask and request, and how far they are apart."""
    peak = sum(predicted.values())
    weights = predicted["weights_bytes"] + predicted["embeddings_bytes"]
    return {
        "attn_removed": mask.count("attn"),
        "ffn_removed": mask.count("ffn"),
        "predicted_weights_bytes": weights,
        "predicted_kv_cache_bytes": predicted["kv_cache_bytes"],
        "predicted_peak_bytes": peak,
        **{f"measured_{key}": value for key, value in found.items()},
        "weights_off_bytes": weights - found["weights_bytes"],
        "kv_cache_off_bytes": predicted["kv_cache_bytes"] - found["kv_cache_bytes"],
        "peak_off": peak / found["peak_bytes"] - 1,
    }


def _write(
    settings: MemorySettings, device: str, cells: dict[str, dict[str, Any]], dtype: str
) -> None:
    def worst(key: str) -> float:
        return float(max(abs(cell[key]) for cell in cells.values()))

    cases = f"{len(cells)} masks and requests"
    off = [100 * abs(cell["peak_off"]) for cell in cells.values()]
    tolerated = 100 * _TOLERATED[device.partition(":")[0]]
    write_record(
        "memory",
        device=device,
        settings=settings,
        targets=[
            harness.Target("bytes off in weights", None, 0.0, worst("weights_off_bytes"), cases),
            harness.Target(
                "bytes off in the KV cache", None, 0.0, worst("kv_cache_off_bytes"), cases
            ),
            harness.Target("% off in the peak, at worst", None, tolerated, max(off), cases),
        ],
        measured={"peak_off_percent": harness.spread(off), "cells": cells},
        notes=[f"{dtype}; the peak is of all tensors, temporary ones in operations included."],
    )


if __name__ == "__main__":
    harness.launch(MemorySettings, main)
