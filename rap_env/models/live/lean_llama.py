"""A Llama decoder in plain torch, for serving in little memory; also of Qwen2 models.

Transformers' Llama imports what inference does not use: the compiler, distributed tensors,
computer algebra and training losses, about 130 MiB of resident memory, which no subclass of
it could save. This one has the same modules under the same names and computes the same
numbers, bit for bit (but for the order in which the norms of a decode step in bfloat16 add),
so masks, levels and caches work on it as on transformers' own. It has only what
`models.live.live_batch.LiveBatch` needs, and whole passes for `PlanScorer`: it runs no block
alone and has no ``generate``.

A decode step spends a third less time than transformers', which for one token is spent on
calling operations rather than in them: so queries and keys are rotated in one tensor, sums
and products are written in place, and a norm is a single operation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedConfig

from rap_env.errors import UnsupportedModelError
from rap_env.models.caches.attention import PACKED_ATTENTION, grouped_query_attention, with_levels
from rap_env.models.weights.packed_modules import meta_embedding

_SIZES = (
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "vocab_size",
)
_FLAGS = ("attention_bias", "mlp_bias", "tie_word_embeddings")
_QWEN2_FLAGS = {"attention_bias": False, "mlp_bias": False}
"""What a Qwen2 model has for Llama's flags, beside biases of queries, keys and values."""
_Rotation = tuple[torch.Tensor, torch.Tensor]


class LeanConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """The config of a Llama model, from a file that states every entry."""

    model_type = "llama"


class LeanQwen2Config(LeanConfig):  # type: ignore[no-untyped-call]
    """The config of a Qwen2 model: a Llama with biases of queries, keys and values."""

    model_type = "qwen2"


def lean_config(folder: Path) -> LeanConfig | None:
    """The config of a model folder if `LeanLlama` computes the model, else None."""
    try:
        entries = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        rope, is_qwen2 = entries["rope_parameters"], entries["model_type"] == "qwen2"
        absent = {**_QWEN2_FLAGS, "head_dim": _head_size(entries)} if is_qwen2 else {}
        known = {**absent, **entries}
        supported = (
            entries["model_type"] in ("llama", "qwen2")
            and entries["hidden_act"] == "silu"
            and rope["rope_type"] == "default"
            and isinstance(rope["rope_theta"], int | float)
            and isinstance(entries["rms_norm_eps"], float)
            and all(type(known[name]) is int for name in _SIZES)
            and all(type(known[name]) is bool for name in _FLAGS)
            and not (is_qwen2 and {*entries["layer_types"]} != {"full_attention"})
        )
    except (OSError, ValueError, LookupError, TypeError):
        return None  # transformers reads it, or names what is wrong
    if not supported:
        return None
    return (LeanQwen2Config if is_qwen2 else LeanConfig).from_dict(entries)


def _head_size(config: Mapping[str, Any]) -> int:
    size: int = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return size


def reject_lean(model: Any, action: str) -> None:
    """Raise an `UnsupportedModelError` for a `LeanLlama`; `action` says what it cannot do."""
    if isinstance(model, LeanLlama):
        raise UnsupportedModelError(
            f"A model that was loaded with lean=True cannot {action}; load it with lean=False. "
            "In an environment on a tiny model, choose a reward without tasks."
        )


class LeanLlama(nn.Module):
    """A causal language model whose parameters are on the meta device until they are loaded.

    Shapes: B sequences, T new tokens, H hidden width, V entries of the vocabulary.

    Args:
        config: From `lean_config`.
        dtype: Dtype of the parameters.
    """

    def __init__(self, config: LeanConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        config._attn_implementation = PACKED_ATTENTION
        self.generation_config: Any = None
        with torch.device("meta"):
            self.model = _Decoder(config, dtype).to(dtype)
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False).to(dtype)
        self.model.rotary_emb = _Rotary(config)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of activations, and of weights that are not packed."""
        return self.model.norm.weight.dtype

    def get_input_embeddings(self) -> nn.Module:
        """The token embeddings."""
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head

    def set_output_embeddings(self, head: nn.Module) -> None:
        """Replace the head."""
        self._modules["lm_head"] = head

    def forward(
        self,
        input_ids: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Any = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
    ) -> SimpleNamespace:
        """Compute the logits of the last tokens (of all, if `logits_to_keep` is 0).

        Args:
            input_ids: (B, T).
            attention_mask: 0 for padding, (B, cached + T).
            position_ids: (B, T).
            cache: A KV cache of transformers, to which the new tokens are appended.
            use_cache: Has no effect: a given cache is used.
            logits_to_keep: Number of tokens of each sequence.

        Returns:
            An object with ``logits``, (B, tokens, V).
        """
        states = self.model(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, cache=cache
        ).last_hidden_state
        return SimpleNamespace(logits=self.lm_head(states[:, -logits_to_keep:]))


class _Decoder(nn.Module):
    def __init__(self, config: LeanConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed_tokens = meta_embedding(config.vocab_size, config.hidden_size, dtype)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(_Layer(config, number) for number in layers)
        self.norm = _RMSNorm(config)
        self.rotary_emb: nn.Module = nn.Identity()  # its buffer is never on the meta device

    def forward(
        self,
        input_ids: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Any = None,
        use_cache: bool = False,
    ) -> SimpleNamespace:
        new = input_ids.shape[1]
        cached = 0 if cache is None else int(cache.get_seq_length())
        if position_ids is None:
            position_ids = torch.arange(cached, cached + new, device=input_ids.device)[None]
        mask = causal_mask(attention_mask, new, cached, input_ids.device)
        states: torch.Tensor = self.embed_tokens(input_ids)
        rotary = self.rotary_emb(position_ids, states.dtype)
        for layer in self.layers:
            states = layer(states, mask, rotary, cache)
        return SimpleNamespace(last_hidden_state=self.norm(states))


class _Layer(nn.Module):
    def __init__(self, config: LeanConfig, number: int) -> None:
        super().__init__()
        self.self_attn = _Attention(config, number)
        self.mlp = _MLP(config)
        self.input_layernorm = _RMSNorm(config)
        self.post_attention_layernorm = _RMSNorm(config)

    def forward(
        self,
        states: torch.Tensor,
        mask: torch.Tensor | None,
        rotary: _Rotation,
        cache: Any,
    ) -> torch.Tensor:
        normed = self.input_layernorm(states)
        states.add_(self.self_attn(normed, mask=mask, rotary=rotary, cache=cache)[0])
        return states.add_(self.mlp(self.post_attention_layernorm(states)))


class _Attention(nn.Module):
    def __init__(self, config: LeanConfig, number: int) -> None:
        super().__init__()
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.layer_idx, self._heads = number, [heads, kv_heads]
        self.num_key_value_groups = heads // kv_heads  # transformers' attention reads it
        size = _head_size(config.__dict__)
        self.head_dim, self.scaling = size, size**-0.5
        width, bias = config.hidden_size, getattr(config, "attention_bias", False)
        biased = bias or isinstance(config, LeanQwen2Config)
        self.q_proj = nn.Linear(width, heads * size, biased)
        self.k_proj = nn.Linear(width, kv_heads * size, biased)
        self.v_proj = nn.Linear(width, kv_heads * size, biased)
        self.o_proj = nn.Linear(heads * size, width, bias)

    def forward(
        self, states: torch.Tensor, *, mask: torch.Tensor | None, rotary: _Rotation, cache: Any
    ) -> tuple[torch.Tensor, None]:
        batch, tokens, _ = states.shape
        # A view where a row has one token; the heads of both in one operation take half of
        # the time
        both = torch.cat((self.q_proj(states), self.k_proj(states)), dim=-1)
        heads = (batch, tokens, -1, self.head_dim)
        both, value = (x.view(heads).transpose(1, 2) for x in (both, self.v_proj(states)))
        query, key = torch.split(_rotated(both, *rotary), self._heads, dim=1)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attended, _ = _attention(self, query, key, value, mask, scaling=self.scaling)
        return self.o_proj(attended.reshape(batch, tokens, -1)), None


_attention = with_levels(grouped_query_attention)


class _MLP(nn.Module):
    def __init__(self, config: LeanConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        bias = getattr(config, "mlp_bias", False)
        self.gate_proj = nn.Linear(width, inner, bias)
        self.up_proj = nn.Linear(width, inner, bias)
        self.down_proj = nn.Linear(inner, width, bias)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        gate = functional.silu(self.gate_proj(states), inplace=True)
        output: torch.Tensor = self.down_proj(gate.mul_(self.up_proj(states)))
        return output


class _RMSNorm(nn.Module):
    def __init__(self, config: LeanConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.hidden_size))
        self._epsilon = config.rms_norm_eps

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        # Without the weight, because transformers rounds to the dtype before it multiplies.
        # Values beside their opposites have a mean of 0: for few, one operation in place of
        # eight.
        if states.shape[-2] == 1 and states.dtype == torch.bfloat16:
            both = torch.cat((states, -states), dim=-1)
            both = torch.layer_norm(both, both.shape[-1:], None, None, self._epsilon)
            return both[..., : states.shape[-1]].mul_(self.weight)
        return functional.rms_norm(states, self.weight.shape, eps=self._epsilon).mul_(self.weight)


class _Rotary(nn.Module):
    """Cosines and sines of rotary position embeddings, (B, 1, T, D) each for heads of D channels.

    The first half of the sines has the sign with which `_rotated` adds them.
    """

    frequencies: torch.Tensor

    def __init__(self, config: LeanConfig) -> None:
        super().__init__()
        base, size = config.rope_parameters["rope_theta"], _head_size(config.__dict__)
        frequencies = 1.0 / (base ** (torch.arange(0, size, 2, dtype=torch.float) / size))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, position_ids: torch.Tensor, dtype: torch.dtype) -> _Rotation:
        angles = position_ids[:, None, :, None].float() * self.frequencies.float()
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def _rotated(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate queries or keys (B, heads, T, D) to their positions, in place."""
    swapped = states.roll(states.shape[-1] // 2, dims=-1)
    return states.mul_(cos).add_(swapped.mul_(sin))


def causal_mask(
    attention_mask: torch.Tensor | None, new: int, cached: int, device: torch.device
) -> torch.Tensor | None:
    """The mask of scaled dot product attention, (B, 1, new, cached + new), True for what is seen.

    None if attention needs none: no token is padding, and either one query sees everything,
    or nothing is cached, which the kernel's own causal attention handles.
    """
    padded = attention_mask is not None and not bool(attention_mask.all())
    if not padded and (new == 1 or not cached):
        return None
    keys = torch.arange(cached + new, device=device)
    seen = (keys[None] <= keys[cached:, None])[None, None]
    if attention_mask is None or not padded:
        return seen
    return seen & attention_mask.bool()[:, None, None]
