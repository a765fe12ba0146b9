"""KV caches of a model whose plan changes: transformers' own caches, layer by layer.

Shapes: B sequences, T tokens cached, K key and value heads, D values in a head.

A plan changes between two steps (`ElasticLLM.apply`), and each cache in use follows: `apply`
immediately evicts the keys and values of a removed attention block, and quantises what is above its
level in place of the old (`layers.lower`). A layer whose cache is below native is a `GroupedLayer`;
it is brought up to a higher level where what was lowered was copied to a file
(`BatchCache.copies`), else it stays as it is.

A restored block lacks the keys and values of the tokens so far, and a cache stays without that
layer. Keys and values that other layers computed under an older plan stay as they are. A new cache,
which `refill` computes from the same tokens, equals that of a model that ran with the plan from the
start, in every layer.

A removed attention block has a uint8 placeholder for each token in the cache, (B, 1, T, 1) (see
`RemovedAttention`), so that lengths and positions stay right for all other layers. The cache itself
therefore shows which layers are missing; no other record of it exists.
"""

from __future__ import annotations

import inspect
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import torch

from rap_env.errors import UnsupportedCacheError
from rap_env.models.caches.grouped_cache import GroupedLayer
from rap_env.models.caches.layers import (
    filled_layers,
    lower,
    native_layer,
    read_back,
    tensors_of,
)
from rap_env.models.families.placeholders import PLACEHOLDER_DTYPE, placeholder_entries


@dataclass(frozen=True)
class Past:
    """The tokens from which a cache was computed.

    Attributes:
        tokens: (B, T).
        attention_mask: (B, T), 0 for padding.
        position_ids: (B, T).
    """

    tokens: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor


def missing(cache: Any) -> frozenset[int]:
    """Layers of a cache that hold placeholders of a removed block."""
    return frozenset(
        number for number, layer in filled_layers(cache) if layer.keys.dtype == PLACEHOLDER_DTYPE
    )


def check_same_blocks(cache: Any, removed: AbstractSet[int]) -> None:
    """Reject a cache that was filled while other attention blocks than these were removed.

    Args:
        cache: The cache, or None.
        removed: Layers whose attention block is removed now.
    """
    filled = {number for number, _ in filled_layers(cache)}
    if filled and missing(cache) != filled & removed:
        raise UnsupportedCacheError(
            "The cache was filled under a plan with other attention blocks than the present one; "
            "give all tokens and no cache, or apply that plan again."
        )


def evict(cache: Any, layers: AbstractSet[int]) -> None:
    """Put placeholders in for keys and values of some layers."""
    for number, layer in list(filled_layers(cache)):
        if number not in layers or layer.keys.dtype == PLACEHOLDER_DTYPE:
            continue
        if isinstance(layer, GroupedLayer):
            cache.layers[number] = _emptied(layer)
            continue
        row = placeholder_entries(layer.keys.shape[0], layer.keys.shape[-2], layer.keys.device)
        layer.keys, layer.values = row, row.clone()


def cache_bytes(cache: Any) -> int:
    """Bytes that a cache occupies: those of the storages of its tensors."""
    storages = {
        storage.data_ptr(): storage.nbytes()
        for _, layer in filled_layers(cache)
        for tensor in tensors_of(layer)
        for storage in (tensor.untyped_storage(),)
    }
    return sum(storages.values())


def _emptied(layer: GroupedLayer) -> Any:
    """Placeholders for the columns of a layer, in transformers' own kind of layer."""
    made = native_layer(layer)
    columns = layer.get_seq_length()
    cached = columns
    if made.is_sliding:
        made.cumulative_length = columns
        cached = min(columns, made.sliding_window - 1)
    row = placeholder_entries(len(layer.lengths), cached, layer.device)
    made.lazy_initialization(row, row)
    made.keys, made.values = row, row.clone()
    return made


def update_cache(llm: Any, cache: Any) -> None:
    """Update a cache to the model's plan, without computing anything."""
    evict(cache, llm.removed_attention)
    levels = {n: llm.plan.cache_level(n) for n in range(llm.adapter.num_layers)}
    lower(cache, levels)
    read_back(cache, levels)


def refill(llm: Any, cache: Any, past: Past, most_tokens: int) -> None:
    """Compute an empty cache under the model's plan, in chunks that bound the workspace.

    At most `most_tokens` tokens, of all sequences together, run at once.
    """
    batch, length = past.tokens.shape
    width = max(1, most_tokens // batch)
    decoder = llm.adapter.decoder(llm.model)
    name = cache_argument(decoder)
    for start in range(0, length, width):
        end = min(length, start + width)
        decoder(
            input_ids=past.tokens[:, start:end],
            attention_mask=past.attention_mask[:, :end],
            position_ids=past.position_ids[:, start:end],
            use_cache=True,
            **{name: cache},
        )


def cache_argument(module: torch.nn.Module) -> str:
    """The cache's argument name in this transformers version: ``cache`` or ``past_key_values``."""
    known = inspect.signature(module.forward).parameters
    return "cache" if "cache" in known else "past_key_values"
