"""Attention of a live model whose caches have levels.

The level of a layer's cache stands on its attention module, as ``cache_level``; without one,
and with a native one, the model's attention runs as transformers has it, or faster for single
tokens on a CPU (`speed_up_decoding`). Else it runs over a cache that is stored in groups, in
pieces of a bounded workspace.

Shapes: B sequences (rows), K key and value heads, R query heads for each of them (N = K R), D
channels of a head, Q queries of a row, P groups of a piece.

The token at position t sees the groups before its own as they are stored, and its own group
unquantised, up to itself. A window of the level hides whole groups, except the first one; the
model's own sliding window hides single tokens. Positions decide that; no mask is read.

- **One new token of each row** (`TokenAttention`). Scales are folded into the queries and
  zeros added to the scores, so that only codes have to be unpacked. Computed in float32; a
  running maximum and sum merge the pieces (Milakov and Gimelshein 2018).
- **Several new tokens** (`BlockAttention`). Stored groups are widened piece by piece. Blocks
  of queries run against the keys that all of them see without a mask, and against the groups
  at the diagonal with one; parts are merged by their log-sum-exp.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rap_env.errors import UnsupportedCacheError
from rap_env.levels import NATIVE_CACHE, CacheLevel
from rap_env.models.caches.grouped_attention import attend
from rap_env.models.caches.grouped_cache import GroupedLayer
from rap_env.models.caches.groups import CURRENT, Chunk, ForwardPass
from rap_env.models.caches.kv_cache import PartedKeys, known_lengths, lower, note_rows
from rap_env.models.families.families import FamilyAdapter, adapter_for
from rap_env.models.families.placeholders import cache_in

LEVEL_ATTENTIONS = {"sdpa": "sdpa_levels", "eager": "eager_levels"}
"""Names of attention in the config of a live model, by their public names."""

Attention = Callable[..., tuple[torch.Tensor, Any]]


def with_levels(base: Attention) -> Attention:
    """An attention function that runs `base` unless the module's cache has a level."""

    def attention(
        module: Any,
        query: torch.Tensor,
        key: Any,
        value: Any,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, Any]:
        if isinstance(key, PartedKeys):
            return key.attend(attention, module, query, attention_mask, **kwargs), None
        level: CacheLevel = module.__dict__.get("cache_level", NATIVE_CACHE)
        if not isinstance(key, Chunk):
            if level.native:
                return base(module, query, key, value, attention_mask, **kwargs)
            # without a cache, as in scoring: all tokens are new
            key, _ = GroupedLayer(level, kwargs.get("sliding_window")).update(key, value)
        window = kwargs.get("sliding_window")
        return (
            attend(
                query,
                key,
                kwargs.get("scaling"),
                kwargs.get("softcap"),
                key.window if window is None else window,
            ),
            None,
        )

    return attention


def install_levels(model: Any, adapter: FamilyAdapter) -> None:
    """Let the attention of a model follow the levels of its caches; nothing changes without any.

    Models whose attention is neither ``sdpa`` nor ``eager`` do not change; see
    `check_attention`.
    """
    name = getattr(model.config, "_attn_implementation", None)
    if name in LEVEL_ATTENTIONS and not getattr(model.config, "output_attentions", False):
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface, eager_mask

        bases: dict[str, tuple[Attention, Any]] = {
            "sdpa": (sdpa_attention_forward, _unread_mask),
            "eager": (_eager, eager_mask),
        }
        base, mask = bases[name]
        AttentionInterface.register(LEVEL_ATTENTIONS[name], with_levels(base))
        AttentionMaskInterface.register(LEVEL_ATTENTIONS[name], mask)
        model.set_attn_implementation(LEVEL_ATTENTIONS[name])
    for module, enter, leave in (
        (model, _note, _forget),
        (adapter.decoder(model), functools.partial(_enter, adapter), _leave),
    ):
        if "_rap_levels" not in module.__dict__:
            module.__dict__["_rap_levels"] = True
            module.register_forward_pre_hook(enter, with_kwargs=True)
            module.register_forward_hook(leave, always_call=True)


def check_attention(model: Any) -> None:
    """Reject a model whose attention cannot run over caches at a level."""
    name = str(getattr(model.config, "_attn_implementation", ""))
    if attention_name(model) not in LEVEL_ATTENTIONS or name in LEVEL_ATTENTIONS:
        raise UnsupportedCacheError(
            f"Levels of KV caches need attention 'sdpa' or 'eager', and this model runs {name!r}"
            + (" with output_attentions=True" if name in LEVEL_ATTENTIONS else "")
            + "; load it with attn_implementation='sdpa'."
        )


def attention_name(model: Any) -> str:
    """The public name of a model's attention: ``sdpa`` also for what runs in its place here.

    Scores do not depend on the difference: their sequences have more than one token.
    """
    name = str(getattr(model.config, "_attn_implementation", ""))
    return next((known for known in LEVEL_ATTENTIONS if name.startswith(f"{known}_")), name)


def _unread_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """Transformers' `sdpa_mask`, which does not read a GPU's padding mask in a decoding step.

    It reads the mask to leave it out if nothing is padded. For a single token of each row
    that saves little, and reading waits for the device; prefills are still without one where
    they can.
    """
    from transformers.masking_utils import sdpa_mask

    padding = kwargs.get("attention_mask")
    if padding is not None and padding.is_cuda and kwargs.get("q_length") == 1:
        kwargs["allow_is_causal_skip"] = False
    mask: torch.Tensor | None = sdpa_mask(*args, **kwargs)
    return mask


def _eager(module: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
    if getattr(module, "reorder_and_upcast_attn", False):  # GPT-2's second one
        upcast: tuple[torch.Tensor, Any] = module._upcast_and_reordered_attn(*args[:4])
        return upcast
    eager: Attention = sys.modules[type(module).__module__].eager_attention_forward
    return eager(module, *args, **kwargs)


def _note(_model: Any, _args: Any, kwargs: dict[str, Any]) -> None:
    CURRENT.mask = kwargs.get("attention_mask")


def _forget(*_: Any) -> None:
    CURRENT.mask = None


def _enter(adapter: FamilyAdapter, decoder: Any, args: tuple[Any, ...], kwargs: Any) -> None:
    """Set the rows of a pass of the decoder, and bring its cache to the levels of its layers."""
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, torch.Tensor):
        mask = CURRENT.mask  # the model may give its decoder another one
    attention = adapter.family.attn
    levels = {
        number: layer._modules[attention].__dict__.get("cache_level", NATIVE_CACHE)
        for number, layer in enumerate(decoder.get_submodule(adapter.family.layers))
    }
    cache = cache_in(kwargs)
    rows = None
    lowered = any(not level.native for level in levels.values())
    if lowered or any(isinstance(layer, GroupedLayer) for layer in getattr(cache, "layers", ())):
        if isinstance(mask, torch.Tensor) and mask.dim() != 2:
            raise UnsupportedCacheError(
                "Levels of KV caches need a padding mask of shape (batch, tokens), not one with "
                f"{mask.dim()} dimensions."
            )
        given = (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        batch, queries = next(states for states in given if states is not None).shape[:2]
        cached = 0 if cache is None else int(cache.get_seq_length())
        rows = known_lengths(cache, batch, cached + queries)
        if rows is None:
            step = ForwardPass.of(batch, queries, cached, mask)
        else:
            step = ForwardPass([max(0, count - queries) for count in rows], rows, cached + queries)
        CURRENT.step = step
        if cache is not None:
            lower(cache, levels, step.before)
    if cache is not None and rows is None:
        note_rows(cache, mask)  # of another shape than (B, T): its rows are unknown


def _leave(*_: Any) -> None:
    CURRENT.step = None


PACKED_ATTENTION = "sdpa_packed"
"""Name of the attention in the config while the model is live."""


def speed_up_decoding(model: Any) -> None:
    """Decode single tokens faster on a CPU, with the same results; other devices do not change.

    Where heads share keys and values (grouped-query attention), torch's kernel for a single
    query reads them once for each head. With the heads of a group as the rows of one query
    matrix it reads them once. Transformers does so only where there is an attention mask.
    """
    if model.device.type != "cpu":
        return
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


# Arguments of model families that have no effect on one query that sees all keys. With any
# other argument the model uses transformers' own attention.
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
    """Transformers' scaled dot product attention with the same results, in less time on a CPU.

    It is faster for single queries without a mask, and for several queries with one.
    """
    known = not set(kwargs) - _IGNORED
    masked = query.shape[2] > 1 and attention_mask is not None
    if known and masked and query.device.type == "cpu":
        # Transformers copies keys and values for each head of a group, which kernels of CUDA need.
        attended = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=True
        )
        return attended.transpose(1, 2).contiguous(), None
    if query.shape[2] > 1 or attention_mask is not None or not known:
        whole: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return whole
    # Queries (B, N, 1, D), keys and values (B, K, T, D), to (B, 1, N, D). The heads of a
    # group are adjacent, so that regrouping them is a view.
    batch, heads, _, width = query.shape
    shared = key.shape[1]
    rows = query.reshape(batch, shared, heads // shared, width)
    attended = functional.scaled_dot_product_attention(rows, key, value, scale=scaling)
    return attended.reshape(batch, 1, heads, attended.shape[-1]), None
