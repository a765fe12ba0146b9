"""Attention of a live model whose caches have levels: today's functions, or attention over groups.

The level of a layer's cache stands on its attention module, as ``cache_level``; without one, and
with a native one, the model's attention runs as transformers (or `models.live.cpu_decode`) has it.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch

from rap_env.errors import UnsupportedCacheError
from rap_env.levels import NATIVE_CACHE, CacheLevel
from rap_env.models.caches.cache_chunks import Chunk, Step, current_step, set_current_step
from rap_env.models.caches.cache_levels import known_lengths, lower, note_rows
from rap_env.models.caches.grouped_attention import attend
from rap_env.models.caches.grouped_cache import GroupedLayer, chunk_of
from rap_env.models.families.adapter import FamilyAdapter
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
        level: CacheLevel = module.__dict__.get("cache_level", NATIVE_CACHE)
        if not isinstance(key, Chunk):
            if level.native:
                return base(module, query, key, value, attention_mask, **kwargs)
            key = chunk_of(level, kwargs.get("sliding_window"), key, value, query.shape[2])
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

    Models whose attention is neither ``sdpa`` nor ``eager`` do not change; see `check_attention`.
    """
    name = getattr(model.config, "_attn_implementation", None)
    if name in LEVEL_ATTENTIONS and not getattr(model.config, "output_attentions", False):
        from transformers import AttentionInterface
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        from transformers.masking_utils import AttentionMaskInterface, eager_mask

        bases: dict[str, tuple[Attention, Any]] = {
            "sdpa": (sdpa_attention_forward, _unread_mask),
            "eager": (_eager, eager_mask),
        }
        base, mask = bases[name]
        AttentionInterface.register(LEVEL_ATTENTIONS[name], with_levels(base))
        AttentionMaskInterface.register(LEVEL_ATTENTIONS[name], mask)
        model.set_attn_implementation(LEVEL_ATTENTIONS[name])
    for module, enter in (
        (model, _note),
        (adapter.decoder(model), functools.partial(_enter, adapter)),
    ):
        if "_rap_levels" not in module.__dict__:
            module.__dict__["_rap_levels"] = True
            module.register_forward_pre_hook(enter, with_kwargs=True)
            module.register_forward_hook(_leave, always_call=True)


def check_attention(model: Any) -> None:
    """Reject a model whose attention cannot run over caches at a level.

    Raises:
        UnsupportedCacheError: Its attention is neither ``sdpa`` nor ``eager``.
    """
    name = str(getattr(model.config, "_attn_implementation", ""))
    if public_name(name) not in LEVEL_ATTENTIONS or name in LEVEL_ATTENTIONS:
        raise UnsupportedCacheError(
            f"Levels of KV caches need attention 'sdpa' or 'eager', and this model runs {name!r}"
            + (" with output_attentions=True" if name in LEVEL_ATTENTIONS else "")
            + "; load it with attn_implementation='sdpa'."
        )


def public_name(name: str) -> str:
    """The public name of an attention: ``sdpa`` for ``sdpa_levels``."""
    return next((known for known in LEVEL_ATTENTIONS if name.startswith(f"{known}_")), name)


def _unread_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """Transformers' `sdpa_mask`, which does not read a GPU's padding mask in a decoding step.

    It reads the mask to leave it out if nothing is padded. For a single token of each row that
    saves little, and reading waits for the device; prefills are still without one where they can.
    """
    from transformers.masking_utils import sdpa_mask

    padding = kwargs.get("attention_mask")
    if padding is not None and padding.is_cuda and kwargs.get("q_length") == 1:
        kwargs["allow_is_causal_skip"] = False
    found: torch.Tensor | None = sdpa_mask(*args, **kwargs)
    return found


def _eager(module: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
    """The eager attention of the module's own family."""
    if getattr(module, "reorder_and_upcast_attn", False):  # GPT-2's second one
        upcast: tuple[torch.Tensor, Any] = module._upcast_and_reordered_attn(*args[:4])
        return upcast
    eager: Attention = sys.modules[type(module).__module__].eager_attention_forward
    return eager(module, *args, **kwargs)


_PASSES = threading.local()


def _note(_model: Any, _args: Any, kwargs: dict[str, Any]) -> None:
    """Remember the padding mask of a pass: a decoder may get prepared masks instead."""
    _open().append((current_step(), kwargs.get("attention_mask")))


def _enter(adapter: FamilyAdapter, decoder: Any, args: tuple[Any, ...], kwargs: Any) -> None:
    """Set the rows of a pass of the decoder, and bring its cache to the levels of its layers."""
    opened = _open()
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, torch.Tensor) and opened:
        mask = opened[-1][1]
    opened.append((current_step(), mask))
    set_current_step(None)
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
        held = 0 if cache is None else int(cache.get_seq_length())
        rows = known_lengths(cache, batch, held + queries)
        if rows is None:
            step = Step.of(batch, queries, held, mask)
        else:
            step = Step([max(0, count - queries) for count in rows], rows, held + queries)
        set_current_step(step)
        if cache is not None:
            lower(cache, levels, step.before)
    if cache is not None and rows is None:
        note_rows(cache, mask)  # of another shape than (B, T): its rows are unknown


def _leave(*_: Any) -> None:
    opened = _open()
    if opened:
        set_current_step(opened.pop()[0])


def _open() -> list[tuple[Step | None, Any]]:
    """The passes that this thread is in, the innermost last: the step before each, and its mask."""
    found: list[tuple[Step | None, Any]] = _PASSES.__dict__.setdefault("open", [])
    return found
