"""Bytes of the parts of a live model, and the facts that the memory arithmetic needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

from rap_env.model_facts import ModelFacts
from rap_env.models.families.adapter import BlockSite
from rap_env.models.weights.packed_modules import PackedModule
from rap_env.models.weights.tensors import named_weights, tensor_key
from rap_env.models.weights.weight_levels import level_bytes

if TYPE_CHECKING:
    from rap_env.models.live.elastic import ElasticLLM


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


def model_facts(llm: ElasticLLM) -> ModelFacts:
    """Facts about a model without a plan."""
    adapter, live = llm.adapter, llm._live
    own, base = llm._own_bytes
    per_token = adapter.kv_bytes_per_token(llm.dtype.itemsize)
    has_cache = [not site.pruned for site in live.sites[::2]]
    native = (place.original for item in live.all_items for place in item.places)
    packed = any(isinstance(module, PackedModule) for module in native)
    return ModelFacts(
        name=llm.name,
        fingerprint=llm.fingerprint,
        dtype=str(llm.dtype).removeprefix("torch."),
        block_param_bytes=own,
        base_bytes=base,
        kv_bytes_per_token=tuple(per_token if cached else 0 for cached in has_cache),
        kv_window_tokens=adapter.kv_window_tokens,
        itemsize=llm.dtype.itemsize,
        hidden_size=adapter.hidden_size,
        ffn_width=adapter.ffn_width,
        vocab_size=adapter.vocab_size,
        max_positions=adapter.max_positions,
        stub_bytes=llm._stub_bytes(),
        repair=llm._repair,
        weights="packed" if packed else "unquantised",
        calibration=live.items[0].calibration,
        **level_bytes(live.items, own, live.embeddings, base),
        widen_bytes=max(item.widen_bytes for item in live.all_items),
        kv_heads=tuple(adapter.kv_heads if cached else 0 for cached in has_cache),
        kv_head_size=(adapter.kv_head_size,) * adapter.num_layers,
    )
