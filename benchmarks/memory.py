"""Predicted bytes against measured bytes: ``python -m benchmarks.memory``.

For each plan a checkpoint without the blocks is saved and loaded (`save_pruned`,
`load_pruned`). Then a prompt is prefilled in chunks, as `MemoryModel` assumes, and a few
tokens are generated, while torch's allocator reports each allocation: the peak is of all
tensors, temporary ones too.
"""

from __future__ import annotations

import contextlib
import gc
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.measuring import ModelSettings, open_model, target, write_record
from experiments.config.common import parse_shape
from experiments.study.console import run_with_settings
from rap_env.memory import PREFILL_CHUNK_TOKENS, MemoryModel
from rap_env.models.caches.kv_cache import cache_argument
from rap_env.models.files.pruned_checkpoint import load_pruned, save_pruned
from rap_env.models.live.elastic import ElasticLLM
from rap_env.plan import Plan
from rap_env.request import Request

REQUESTS = ("1x128", "1x1024", "4x1024", "8x2048")
"""Batch size x tokens of prompt and answer."""
ANSWER_TOKENS, REMOVED_SHARE = 4, 0.3

_TOLERATED_PERCENT = {"cpu": 10.0, "cuda": 5.0}


@contextlib.contextmanager
def measured_peak(device: torch.device) -> Iterator[list[int]]:
    """Measure the peak of all tensor allocations in a ``with`` block, above those before it.

    On CUDA it comes from the allocator's own counters, on a CPU from every event of torch's
    allocator, temporary tensors inside operations included. It does not include pages of
    memory-mapped files, buffers that BLAS libraries allocate themselves, and the release of
    tensors from before the block. On a CPU the block should last seconds, not hours, because
    each operation leaves a profiler event until its end. Blocks cannot be nested.

    Yields:
        A list that has the peak in bytes after the block.
    """
    peak: list[int] = []
    if device.type == "cuda":
        factor = torch.ones(64, 64, device=device)
        factor @ factor  # the library takes its workspace, which is of no single measurement
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.append(torch.cuda.max_memory_allocated(device) - before)
        return
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as seen:
        yield peak
    results: Any = seen.profiler
    reports = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    allocated, most = 0, 0
    for report in sorted(reports, key=lambda report: report.start_ns()):
        allocated += report.nbytes()  # negative for freed memory
        most = max(most, allocated)
    peak.append(most)


def plans_of(num_blocks: int) -> dict[str, Plan]:
    """The native plan, and plans without random blocks of both kinds and of either kind."""
    drawn = random.Random(0).sample(range(num_blocks), num_blocks)
    count = round(REMOVED_SHARE * num_blocks)
    kinds = {"even": drawn, "attn": [i for i in drawn if i % 2 == 0]}
    kinds["ffn"] = [i for i in drawn if i % 2]
    return {"dense": Plan()} | {n: Plan.removing(*some[:count]) for n, some in kinds.items()}


def main(settings: ModelSettings) -> None:
    """Measure, and write the record; `repeats` has no effect, since bytes do not vary."""
    llm = open_model(settings)
    memory, device, plans = MemoryModel(llm), llm.device, plans_of(llm.num_blocks)
    cells: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, plan in plans.items():
            save_pruned(llm, plan, Path(folder, name))
        del llm
        for name, plan in plans.items():
            gc.collect()
            pruned = load_pruned(Path(folder, name), device=str(device))
            for text in REQUESTS:
                request = Request(*parse_shape(text), budget_bytes=2**62)
                weights, kv_cache, peak = measure(pruned, request)
                predicted = memory.breakdown(plan, request)
                cells[f"{name} {text}"] = {
                    "peak_bytes": peak,
                    "weights_off_bytes": predicted.weights + predicted.embeddings - weights,
                    "kv_cache_off_bytes": predicted.kv_cache - kv_cache,
                    "peak_off_%": 100 * (predicted.peak / peak - 1),
                }
            del pruned

    def worst(key: str) -> float:
        return float(max(abs(cell[key]) for cell in cells.values()))

    bounds = {
        "bytes off in weights": ("weights_off_bytes", 0.0),
        "bytes off in the KV cache": ("kv_cache_off_bytes", 0.0),
        "% off in the peak, at worst": ("peak_off_%", _TOLERATED_PERCENT[device.type]),
    }
    against = f"{len(cells)} masks and requests"
    targets = [
        target(what, worst(key), at_most=most, against=against)
        for what, (key, most) in bounds.items()
    ]
    write_record("memory", settings, targets, device=str(device), cells=cells)


@torch.no_grad()
def measure(pruned: ElasticLLM, request: Request) -> tuple[int, int, int]:
    """Bytes that a model without the removed blocks holds while it serves a request.

    Args:
        pruned: The model.
        request: The request, longer than `ANSWER_TOKENS`; its budget has no effect.

    Returns:
        Bytes of weights and embeddings, of the KV cache of kept attn blocks, and the peak.
    """
    from transformers import DynamicCache

    tensors = pruned.model.state_dict(keep_vars=True).values()
    weights = sum({id(tensor): tensor.nbytes for tensor in tensors}.values())
    chunk = max(1, PREFILL_CHUNK_TOKENS // request.batch_size)
    ids = torch.ones(request.batch_size, request.seq_len_tokens, dtype=torch.long)
    prompt, answer = ids[:, :-ANSWER_TOKENS], ids[:, -ANSWER_TOKENS:]
    with measured_peak(pruned.device) as peak:
        cache: Any = DynamicCache(config=pruned.model.config)
        for part in [*torch.split(prompt, chunk, 1), *torch.split(answer, 1, 1)]:
            pruned.model(
                input_ids=part.to(pruned.device),
                use_cache=True,
                logits_to_keep=1,
                **{cache_argument(pruned.model): cache},
            )
    kept = (layer for n, layer in enumerate(cache.layers) if 2 * n not in pruned.pruned.removed)
    kv_cache = sum(layer.keys.nbytes + layer.values.nbytes for layer in kept)
    return weights, kv_cache, weights + peak[0]


if __name__ == "__main__":
    run_with_settings(ModelSettings, main)
