"""Entries of a config by which vLLM serves a model without some of its blocks.

vLLM's ``DeciLMForCausalLM`` reads from ``block_configs`` which blocks of each layer are left out.
"""

from __future__ import annotations

from typing import Any

from rap_env.errors import UnsupportedModelError
from rap_env.models.families.adapter import FamilyAdapter
from rap_env.plan import Plan

LLAMA_LIKE = ("llama", "mistral", "qwen2")
"""Model types whose blocks are those of Llama, some with biases: what other engines can prune."""

VLLM_ENTRIES = ("block_configs", "qkv_bias")
"""Entries that `vllm_entries` adds to those of the family, beside ``architectures``."""

_ARCHITECTURE = "DeciLMForCausalLM"


def vllm_entries(adapter: FamilyAdapter, removed: Plan, *, stubs: bool) -> dict[str, Any]:
    """The entries for a model without some blocks.

    Args:
        adapter: Of the model.
        removed: The removed blocks.
        stubs: Whether stubs stand in the places of some.

    Raises:
        UnsupportedModelError: vLLM cannot serve it; the text has the reason.
    """
    config = adapter.config
    if adapter.model_type not in LLAMA_LIKE:
        raise UnsupportedModelError(
            f"vLLM can only leave blocks out of models like Llama, and {adapter.model_type} is "
            f"none; known are {', '.join(LLAMA_LIKE)}."
        )
    if any(window is not None for window in adapter.kv_window_tokens):
        raise UnsupportedModelError(
            f"vLLM's {_ARCHITECTURE} has no sliding window, and this {adapter.model_type} has one."
        )
    if stubs:
        raise UnsupportedModelError(
            "vLLM has nothing to put in the place of a removed block; choose a plan without stubs "
            "(--repair none)."
        )
    first = next((i for i in range(adapter.num_blocks) if i not in removed.removed), None)
    if first is None or first % 2:
        raise UnsupportedModelError(
            f"vLLM's {_ARCHITECTURE} cannot start with a feed-forward block: its norm expects the "
            "residual stream of an attention block before it. Keep the first attention block."
        )
    group = config.num_attention_heads // adapter.kv_heads
    gone = [index in removed.removed for index in range(adapter.num_blocks)]
    blocks = [
        {
            "attention": {"no_op": attn, "n_heads_in_group": None if attn else group},
            "ffn": {"no_op": ffn, "intermediate_size": None if ffn else adapter.ffn_width},
        }
        for attn, ffn in zip(gone[::2], gone[1::2], strict=True)
    ]
    entries: dict[str, Any] = {"architectures": [_ARCHITECTURE], "block_configs": blocks}
    if adapter.model_type == "qwen2":  # biases of queries, keys and values, but not of the output
        entries["qkv_bias"] = True
    return entries
