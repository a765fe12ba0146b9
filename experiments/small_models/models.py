"""The two kinds of small language model: blocks that cost the same, and blocks that do not."""

from __future__ import annotations

from typing import Any

import torch

from experiments.config import SmallLMConfig

EXPERTS_PER_TOKEN = 2
_BALANCE = 0.01  # weight of the loss that keeps all experts in use


def untrained(settings: SmallLMConfig, tokenizer: Any, seed: int) -> Any:
    """A causal language model with random weights in float32.

    Args:
        settings: Its family and sizes.
        tokenizer: Gives the vocabulary, and the start and the end token.
        seed: Seeds the weights.
    """
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    make = {"uniform": _uniform, "unequal": _unequal}[settings.family]
    config = make(settings, _shared(settings, tokenizer))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return auto.from_config(config, dtype=torch.float32)


def _shared(settings: SmallLMConfig, tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": settings.hidden_size,
        "intermediate_size": settings.ffn_size,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "num_key_value_heads": settings.heads,
        "max_position_embeddings": settings.max_positions,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _uniform(settings: SmallLMConfig, shared: dict[str, Any]) -> Any:
    """Llama: every attn block costs a request the same, and so does every ffn block."""
    from transformers import LlamaConfig

    return LlamaConfig(**shared)


def _unequal(settings: SmallLMConfig, shared: dict[str, Any]) -> Any:
    """Qwen2-MoE: every other attn block slides, and experts come and go in pairs of layers.

    With four layers or more, each of the four combinations of cheap and dear blocks occurs.
    """
    from transformers import Qwen2MoeConfig

    layers = range(settings.layers)
    return Qwen2MoeConfig(
        **shared,
        use_sliding_window=True,
        sliding_window=settings.sliding_window_tokens,
        layer_types=["full_attention" if n % 2 else "sliding_attention" for n in layers],
        mlp_only_layers=[n for n in layers if n % 4 in (0, 3)],
        num_experts=settings.experts,
        num_experts_per_tok=EXPERTS_PER_TOKEN,
        moe_intermediate_size=settings.expert_size,
        shared_expert_intermediate_size=settings.expert_size,
        router_aux_loss_coef=_BALANCE,
    )
