"""Single tokens on a CPU: two things that torch does the long way, done the short way.

Both give what the long way gives.

- **Attention.** Where heads share keys and values, torch's kernel for a lone query goes through
  them once for each head. With the heads of a group as the rows of one query matrix it goes through
  them once. Transformers does so itself where there is a mask, and leaves it to torch where not.
- **Head.** Logits are wanted of the last token of each sequence, a slice of a batch. For such a
  slice torch copies the weights of the head once for each sequence before it multiplies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

NAME = "sdpa_packed"
"""What the attention is called in a config while the model is live."""


def take_short_ways(model: Any) -> None:
    """Let a model on a CPU take the short ways for single tokens; others stay as they are.

    Args:
        model: A causal language model of transformers.
    """
    if model.device.type == "cpu":
        model.get_output_embeddings().register_forward_pre_hook(_alone)
        _pack_single_queries(model)


def attention_name(model: Any) -> str:
    """What a model's attention is called by others; the short way is one of ``sdpa``'s.

    Scores do not depend on it: their sequences have more than one token.
    """
    name = str(getattr(model.config, "_attn_implementation", ""))
    return "sdpa" if name == NAME else name


def _alone(_head: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
    """The last tokens' states (B, 1, H) as a tensor of their own, if they are part of another."""
    states = args[0]
    if states.dim() != 3 or states.shape[1] != 1 or states.stride(0) == states.shape[2]:
        return None
    # Not contiguous(): a dimension of size 1 may keep any stride there.
    return (torch.empty_like(states, memory_format=torch.contiguous_format).copy_(states),)


def _pack_single_queries(model: Any) -> None:
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    config = model.config.get_text_config(decoder=True)
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    shared = kv_heads < config.num_attention_heads
    if not shared or model.config._attn_implementation != "sdpa":
        return

    def attend(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        if query.shape[2] > 1 or attention_mask is not None or set(kwargs) - _HARMLESS:
            whole: tuple[torch.Tensor, None] = sdpa_attention_forward(
                module, query, key, value, attention_mask, scaling=scaling, **kwargs
            )
            return whole
        return _single(query, key, value, scaling), None

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


# What families hand over that changes nothing for one query that sees all keys. With anything
# else the model takes transformers' way.
_HARMLESS = frozenset(
    {"dropout", "output_router_logits", "position_ids", "sliding_window", "use_cache"}
)


def _single(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """Attention of one token: queries (B, N, 1, D), keys and values (B, K, T, D), to (B, 1, N, D).

    The heads of a group lie next to each other, so that regrouping them is a view.
    """
    batch, heads, _, width = query.shape
    shared = key.shape[1]
    rows = query.reshape(batch, shared, heads // shared, width)
    found = functional.scaled_dot_product_attention(rows, key, value, scale=scaling)
    return found.reshape(batch, 1, heads, found.shape[-1])
