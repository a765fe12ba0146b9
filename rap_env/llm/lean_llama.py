"""A Llama decoder in plain torch, for serving in little memory.

Transformers' Llama imports what inference does not use: the compiler, distributed tensors, computer
algebra and training losses, about 130 MiB of resident memory. This one has the same modules under
the same names and computes the same numbers, bit for bit, so masks, levels and caches work on it as
on transformers' own. It has only what `rap_env.llm.live_batch.LiveBatch` needs: it cannot be
scored and has no ``generate``.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedConfig

from rap_env.errors import UnsupportedModelError
from rap_env.llm.attention_levels import with_levels
from rap_env.llm.cpu_decode import PACKED_ATTENTION, grouped_query_attention
from rap_env.llm.packed_modules import meta_embedding

_SIZES = (
    "head_dim", "hidden_size", "intermediate_size", "max_position_embeddings",
    "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "vocab_size",
)  # fmt: skip
_FLAGS = ("attention_bias", "mlp_bias", "tie_word_embeddings")


class LeanConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """The config of a Llama model, from a file that states every entry."""

    model_type = "llama"


def lean_config(folder: Path) -> LeanConfig | None:
    """The config of a model folder if it is a Llama model that `LeanLlama` computes, else None."""
    try:
        entries = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        rope = entries["rope_parameters"]
        supported = (
            entries["model_type"] == "llama"
            and entries["hidden_act"] == "silu"
            and rope["rope_type"] == "default"
            and isinstance(rope["rope_theta"], int | float)
            and isinstance(entries["rms_norm_eps"], float)
            and all(type(entries[name]) is int for name in _SIZES)
            and all(type(entries[name]) is bool for name in _FLAGS)
        )
    except (OSError, ValueError, LookupError, TypeError):
        return None  # transformers reads it, or names what is wrong
    return LeanConfig.from_dict(entries) if supported else None


def reject_lean(model: Any, action: str) -> None:
    """Raise an `UnsupportedModelError` for a `LeanLlama`; `action` says what it cannot do."""
    if isinstance(model, LeanLlama):
        raise UnsupportedModelError(
            f"A model that was loaded with lean=True cannot {action}; load it with lean=False."
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
            self.lm_head = _linear(config.hidden_size, config.vocab_size, False).to(dtype)
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
        held = 0 if cache is None else int(cache.get_seq_length())
        if position_ids is None:
            position_ids = torch.arange(held, held + new, device=input_ids.device)[None]
        mask = causal_mask(attention_mask, new, held, input_ids.device)
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
        rotary: tuple[torch.Tensor, torch.Tensor],
        cache: Any,
    ) -> torch.Tensor:
        normed = self.input_layernorm(states)
        states = states + self.self_attn(normed, mask=mask, rotary=rotary, cache=cache)[0]
        added: torch.Tensor = self.mlp(self.post_attention_layernorm(states))
        return states + added


class _Attention(nn.Module):
    def __init__(self, config: LeanConfig, number: int) -> None:
        super().__init__()
        heads, kv_heads, size = (
            config.num_attention_heads, config.num_key_value_heads, config.head_dim,
        )  # fmt: skip
        self.layer_idx = number
        self.head_dim = size
        self.num_key_value_groups = heads // kv_heads  # transformers' attention reads it
        self.scaling = size**-0.5
        width, bias = config.hidden_size, config.attention_bias
        self.q_proj = _linear(width, heads * size, bias)
        self.k_proj = _linear(width, kv_heads * size, bias)
        self.v_proj = _linear(width, kv_heads * size, bias)
        self.o_proj = _linear(heads * size, width, bias)

    def forward(
        self,
        states: torch.Tensor,
        *,
        mask: torch.Tensor | None,
        rotary: tuple[torch.Tensor, torch.Tensor],
        cache: Any,
    ) -> tuple[torch.Tensor, None]:
        shape = (*states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            project(states).view(shape).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if states.shape[1] == 1:  # one operation for both takes half of the time
            heads = [query.shape[1], key.shape[1]]
            both = _rotated(torch.cat((query, key), dim=1), *rotary)
            query, key = torch.split(both, heads, dim=1)
        else:
            query, key = _rotated(query, *rotary), _rotated(key, *rotary)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        found, _ = _attention(self, query, key, value, mask, scaling=self.scaling)
        return self.o_proj(found.reshape(*states.shape[:-1], -1)), None


_attention = with_levels(grouped_query_attention)


class _MLP(nn.Module):
    def __init__(self, config: LeanConfig) -> None:
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = _linear(width, inner, bias)
        self.up_proj = _linear(width, inner, bias)
        self.down_proj = _linear(inner, width, bias)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        gate = functional.silu(self.gate_proj(states), inplace=True)
        found: torch.Tensor = self.down_proj(gate.mul_(self.up_proj(states)))
        return found


class _RMSNorm(nn.Module):
    def __init__(self, config: LeanConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.hidden_size))
        self._epsilon = config.rms_norm_eps

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        wide = states.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self._epsilon)
        return wide.to(states.dtype).mul_(self.weight)


class _Rotary(nn.Module):
    """Cosines and sines of rotary position embeddings, (B, T, D) each for heads of D channels."""

    frequencies: torch.Tensor

    def __init__(self, config: LeanConfig) -> None:
        super().__init__()
        base, size = config.rope_parameters["rope_theta"], config.head_dim
        frequencies = 1.0 / (base ** (torch.arange(0, size, 2, dtype=torch.float) / size))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(
        self, position_ids: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None].float() * self.frequencies.float()
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def _rotated(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate queries or keys (B, heads, T, D) to their positions."""
    first, second = states.chunk(2, dim=-1)
    swapped = torch.cat((-second, first), dim=-1)
    return states * cos[:, None] + swapped * sin[:, None]


def causal_mask(
    attention_mask: torch.Tensor | None, new: int, held: int, device: torch.device
) -> torch.Tensor | None:
    """The mask of scaled dot product attention, (B, 1, new, held + new), True for what is seen.

    None if attention needs none: no token is padding, and either one query sees everything, or
    nothing is cached, which the kernel's own causal attention handles.
    """
    padded = attention_mask is not None and not bool(attention_mask.all())
    if not padded and (new == 1 or not held):
        return None
    keys = torch.arange(held + new, device=device)
    seen = (keys[None] <= keys[held:, None])[None, None]
    if attention_mask is None or not padded:
        return seen
    return seen & attention_mask.bool()[:, None, None]


def _linear(inputs: int, outputs: int, bias: bool) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=bias)
