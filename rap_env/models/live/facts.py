"""Bytes of the parts of a live model, and the facts that the memory arithmetic needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from rap_env.models.families.adapter import BlockSite, FamilyAdapter
from rap_env.models.live.live_blocks import LiveBlocks
from rap_env.models.weights.packed_modules import PackedModule
from rap_env.models.weights.tensors import named_weights, tensor_key
from rap_env.models.weights.weight_levels import level_bytes


def own_bytes(model: nn.Module, sites: Iterable[BlockSite]) -> tuple[tuple[int, ...], int]:
    """Bytes of each block's own tensors, (2L,), and bytes of all other tensors.

    No block may be removed from the model.
    """
    uses = Counter(tensor_key(tensor) for _, tensor in named_weights(model))
    own = []
    for site in sites:
        inside = Counter(tensor_key(t) for part in site.modules for _, t in named_weights(part))
        # A tensor that is also used elsewhere (tied) is not freed with the block.
        own.append(sum(key[-1] for key, count in inside.items() if count == uses[key]))
    return tuple(own), sum(key[-1] for key in uses) - sum(own)


def shared_facts(
    adapter: FamilyAdapter,
    live: LiveBlocks,
    weight_bytes: tuple[tuple[int, ...], int],
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Those `ModelFacts` that all views of a model share; `weight_bytes` is from `own_bytes`."""
    own, base = weight_bytes
    per_token = adapter.kv_bytes_per_token(dtype.itemsize)
    has_cache = [not site.pruned for site in live.sites[::2]]
    native = (place.original for item in live.all_items for place in item.places)
    packed = any(isinstance(module, PackedModule) for module in native)
    return dict(
        dtype=str(dtype).removeprefix("torch."),
        block_param_bytes=own,
        base_bytes=base,
        kv_bytes_per_token=tuple(per_token if cached else 0 for cached in has_cache),
        kv_window_tokens=adapter.kv_window_tokens,
        itemsize=dtype.itemsize,
        hidden_size=adapter.hidden_size,
        ffn_width=adapter.ffn_width,
        vocab_size=adapter.vocab_size,
        max_positions=adapter.max_positions,
        weights="packed" if packed else "unquantised",
        **level_bytes(live.items, own, live.embeddings, base),
        widen_bytes=max(item.widen_bytes for item in live.all_items),
        kv_heads=tuple(adapter.kv_heads if cached else 0 for cached in has_cache),
        kv_head_size=(adapter.kv_head_size,) * adapter.num_layers,
    )
