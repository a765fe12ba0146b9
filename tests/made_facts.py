"""Facts of made-up models, in which an attention and an ffn block of each layer are alike."""

from typing import Any

from rap_env.memory import ModelFacts


def made_facts(
    layers: int, attn_bytes: int = 1000, ffn_bytes: int = 3000, **changed: Any
) -> ModelFacts:
    values: dict[str, Any] = {
        "name": "made",
        "fingerprint": "a" * 64,
        "dtype": "bfloat16",
        "block_param_bytes": (attn_bytes, ffn_bytes) * layers,
        "base_bytes": 500,
        "kv_bytes_per_token": (4,) * layers,
        "kv_window_tokens": (None,) * layers,
        "itemsize": 2,
        "hidden_size": 1,
        "ffn_width": 4,
        "vocab_size": 1,
        "max_positions": 4096,
    }
    return ModelFacts(**{**values, **changed})
