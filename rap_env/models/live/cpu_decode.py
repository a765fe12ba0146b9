"""Faster decoding of single tokens on a CPU, with the same results.

- **Attention.** Where heads share keys and values (grouped-query attention), torch's kernel for a
  single query reads them once for each head. With the heads of a group as the rows of one query
  matrix it reads them once. Transformers does so only where there is an attention mask.
- **Head.** Logits are computed for the last token of each sequence, a slice of a batch. For such a
  slice torch copies the weights of the head once for each sequence before it multiplies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rap_env.models.caches.attention import LEVEL_ATTENTIONS, with_levels
from rap_env.models.families.adapter import adapter_for

PACKED_ATTENTION = "sdpa_packed"
"""Name of the attention in the config while the model is live."""


def speed_up_decoding(model: Any) -> None:
    """Install both optimisations in a model on a CPU; models on other devices do not change."""
    if model.device.type == "cpu":
        model.get_output_embeddings().register_forward_pre_hook(_contiguous_rows)
        _pack_single_queries(model)


def _contiguous_rows(_head: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
    """Copy the last tokens' states (B, 1, H) if they are a slice of a larger tensor."""
    states = args[0]
    if states.dim() != 3 or states.shape[1] != 1 or states.stride(0) == states.shape[2]:
        return None
    # Not contiguous(): a dimension of size 1 may keep any stride there.
    return (torch.empty_like(states, memory_format=torch.contiguous_format).copy_(states),)


def _pack_single_queries(model: Any) -> None:
    adapter = adapter_for(model.config)
    shared = adapter.kv_heads < adapter.config.num_attention_heads
    if not shared or model.config._attn_implementation not in ("sdpa", LEVEL_ATTENTIONS["sdpa"]):
        return
    # These import torch's compiler: much memory, which a model that has this attention saves.
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(PACKED_ATTENTION, with_levels(grouped_query_attention))
    AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)
    model.set_attn_implementation(PACKED_ATTENTION)


# Arguments of model families that have no effect on one query that sees all keys. With any other
# argument the model uses transformers' own attention.
_IGNORED = frozenset(
    {"dropout", "output_router_logits", "position_ids", "sliding_window", "use_cache"}
)


def grouped_query_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' scaled dot product attention, faster for single queries without a mask."""
    if query.shape[2] > 1 or attention_mask is not None or set(kwargs) - _IGNORED:
        whole: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return whole
    # Queries (B, N, 1, D), keys and values (B, K, T, D), to (B, 1, N, D). The heads of a group are
    # adjacent, so that regrouping them is a view.
    batch, heads, _, width = query.shape
    shared = key.shape[1]
    rows = query.reshape(batch, shared, heads // shared, width)
    attended = functional.scaled_dot_product_attention(rows, key, value, scale=scaling)
    return attended.reshape(batch, 1, heads, attended.shape[-1]), None
