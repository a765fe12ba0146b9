"""Decoding speed under masks, relative to the dense model: ``python -m benchmarks.decode``.

If decoding is bound by reading weights and cache, a mask that removes the share x of the bytes
makes it 1 / (1 - x) times as fast. The target is the reached part of that speed-up. The record also
has its bounds: time and bytes per second of an attn block, of an ffn block and of the rest, and of
a plain read of memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks.decode_step import (
    ORDERS,
    MemoryTraffic,
    decode_seconds,
    of_proportional,
    worst_target,
)  # fmt: skip
from benchmarks.harness import ModelSettings, Target, launch, open_model, spread
from benchmarks.record import write_record
from rap_env.blocks import BlockMask
from rap_env.models.live.elastic import ElasticLLM

_ORDER_NAMES = {"even": "attn and ffn alike", "ffn": "ffn alone", "attn": "attn first"}
_READ_BYTES = 2**29
_CORNERS = ("dense", "no attn", "no ffn", "no block")


@dataclass
class DecodeSettings(ModelSettings):
    """Settings of this benchmark."""

    context_tokens: int = 512
    steps: int = 8
    """Decode steps in one measurement."""
    shares: list[float] = field(default_factory=lambda: [0.15, 0.3, 0.5])
    """Shares of the bytes to remove."""


def main(settings: DecodeSettings) -> None:
    """Measure, and write the record."""
    llm = open_model(settings)
    traffic = MemoryTraffic(llm, settings.context_tokens)
    masks = _masks(llm, traffic, settings.shares)
    step_s = decode_seconds(
        {name: (llm, mask) for name, mask in masks.items()},
        settings.context_tokens, settings.steps, settings.repeats,
        {"read": _memory_read(llm.device)},
    )  # fmt: skip
    measured = {name: _side(masks[name], step_s, name, traffic) for name in masks}
    rates = _read_rates(step_s, traffic, llm.adapter.num_layers)
    write_record(
        "decode",
        device=str(llm.device),
        settings=settings,
        targets=[_target(order, measured, settings.shares) for order in ORDERS],
        measured={"masks": measured, "read": rates},
        notes=[
            f"{llm.facts.dtype}, batch 1, {settings.context_tokens} tokens of context.",
            *_bounds(rates),
        ],
    )


def _masks(llm: ElasticLLM, traffic: MemoryTraffic, shares: list[float]) -> dict[str, BlockMask]:
    """The dense model, masks that separate attn, ffn and the rest, and the masks of the targets."""
    corners = (
        BlockMask(),
        BlockMask.all_of(llm.blocks, "attn"),
        BlockMask.all_of(llm.blocks, "ffn"),
        BlockMask.all_of(llm.blocks),
    )
    targets = {f"{o} {share:.0%}": traffic.mask(o, share) for o in ORDERS for share in shares}
    return dict(zip(_CORNERS, corners, strict=True)) | targets


def _memory_read(device: Any) -> Any:
    """A plain read of memory: a sum over more bytes than any CPU cache holds."""
    import torch

    values = torch.ones(_READ_BYTES // 4, device=device)
    return values.sum


def _side(
    mask: BlockMask, step_s: dict[str, list[float]], name: str, traffic: MemoryTraffic
) -> dict[str, Any]:
    share = traffic.share(mask)
    return {
        "attn_removed": mask.count("attn"),
        "ffn_removed": mask.count("ffn"),
        "bytes_share_removed": share,
        "step_s": spread(step_s[name]),
        "of_proportional": of_proportional(step_s["dense"], step_s[name], share),
    }


def _target(order: str, measured: dict[str, Any], shares: list[float]) -> Target:
    """The target of one order: its worst mask counts."""
    sides = [measured[f"{order} {share:.0%}"] for share in shares]
    return worst_target(_ORDER_NAMES[order], sides)


def _read_rates(
    step_s: dict[str, list[float]], traffic: MemoryTraffic, layers: int
) -> dict[str, Any]:
    """Seconds, bytes and bytes per second of one block of each kind and of the rest of a step."""
    dense, no_attn, no_ffn, none = (spread(step_s[name])["median"] for name in _CORNERS)
    attn, ffn = sum(traffic.block_bytes[0::2]), sum(traffic.block_bytes[1::2])
    parts = {
        "attn_block": (attn / layers, (dense - no_attn) / layers),
        "ffn_block": (ffn / layers, (dense - no_ffn) / layers),
        "rest": (traffic.rest_bytes, none),
        "dense_step": (traffic.step_bytes(BlockMask()), dense),
        "plain_read": (_READ_BYTES, spread(step_s["read"])["median"]),
    }
    return {
        name: {"bytes": size, "seconds": took, "bytes_per_s": size / took}
        for name, (size, took) in parts.items()
    }


def _bounds(rates: dict[str, Any]) -> list[str]:
    """Sentences that explain the read rates."""
    words = {
        "attn_block": "a kept attn block",
        "ffn_block": "a kept ffn block",
        "rest": "everything else (head, norms, placeholders of removed blocks)",
    }
    parts = [
        f"{text} {rates[name]['bytes'] / 1e6:.1f} MB in {rates[name]['seconds'] * 1e3:.2f} ms "
        f"({rates[name]['bytes_per_s'] / 1e9:.1f} GB/s)"
        for name, text in words.items()
    ]
    peak, dense = rates["plain_read"]["bytes_per_s"], rates["dense_step"]["bytes_per_s"]
    return [
        f"In a dense step {'; '.join(parts)}; a plain read of memory reaches {peak / 1e9:.1f} GB/s "
        f"and the whole step {dense / peak:.0%} of that.",
        "A kind of block that is read faster than the average costs less time than its bytes "
        "suggest: removing only that kind misses the target, removing only the other exceeds it.",
    ]


if __name__ == "__main__":
    launch(DecodeSettings, main)
