"""The KV cache of a model whose mask changes: transformers' own cache, layer by layer.

Shapes: B sequences, T tokens cached, K key and value heads, D values in a head.

A mask changes between two steps (`ElasticLLM.apply`), and each cache in use is updated before its
own next step. `apply` immediately evicts the keys and values of a removed attention block. A
restored block lacks those of the tokens so far, and `Restore` selects what happens:

================  ============================  =======================================
Restore           Bytes                         Time
================  ============================  =======================================
``refill``        its KV cache of all tokens    a pass of all tokens over all kept
                                                blocks, without the head
``next_request``  none until the cache is new   none
================  ============================  =======================================

After a refill the state equals that of a model that ran with the new mask from the start, in every
layer. Without one, keys and values that other layers computed under an older mask stay as they are:
any change of the mask has that effect on earlier tokens.

**Levels.** A layer whose cache is below native is a `GroupedLayer`. A layer is brought down to its
level at once, by `apply` or by the next pass (`lower`): what it holds is quantised in place
of the old. It is brought up to a higher level as a block is restored, by a refill or when the cache
is new; or at once, where what was lowered was copied to a file (`BatchCache.copies`).

A removed attention block has a uint8 placeholder for each token in the cache, (B, 1, T, 1) (see
`RemovedAttention`), so that lengths and positions stay right for all other layers. The cache itself
therefore shows which layers are missing; no other record of it exists.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from rap_env.errors import UnsupportedCacheError
from rap_env.memory import PREFILL_CHUNK_TOKENS
from rap_env.models.caches.grouped_cache import GroupedLayer
from rap_env.models.caches.layers import (
    DYNAMIC_LAYERS,
    filled_layers,
    lower,
    native_layer,
    raised,
    read_back,
    tensors_of,
)
from rap_env.models.families.placeholders import PLACEHOLDER_DTYPE, placeholder_entries

Restore = Literal["refill", "next_request"]
"""What happens to the earlier tokens of a restored attention block."""

RESTORES: tuple[Restore, ...] = get_args(Restore)


@dataclass(frozen=True)
class Past:
    """The tokens from which a cache was computed.

    Attributes:
        tokens: (B, T).
        attention_mask: (B, T), 0 for padding.
        position_ids: (B, T).
    """

    tokens: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor


def check_cache(cache: Any) -> None:
    """Reject a cache with layers of an unknown kind, or offloaded ones: they cannot be changed."""
    from transformers import cache_utils

    known = (*DYNAMIC_LAYERS, cache_utils.StaticLayer, cache_utils.StaticSlidingWindowLayer)
    layers = getattr(cache, "layers", None)
    kinds = sorted({type(layer).__name__ for layer in layers or () if type(layer) not in known})
    if layers is None or kinds or getattr(cache, "offloading", False):
        seen = ", ".join(kinds) or ("offloaded layers" if layers is not None else "no layers")
        raise UnsupportedCacheError(
            f"The mask changed while a {type(cache).__name__} with {seen} was in use, and only "
            "dynamic and static caches, sliding or not, can be updated; use one of those, or "
            "change masks between requests."
        )


def missing(cache: Any) -> frozenset[int]:
    """Layers of a cache that hold placeholders of a removed block."""
    return frozenset(
        number for number, layer in filled_layers(cache) if layer.keys.dtype == PLACEHOLDER_DTYPE
    )


def layers_with_keys(cache: Any, layers: AbstractSet[int]) -> list[int]:
    """The subset of `layers` whose keys and values the cache holds."""
    return [
        n
        for n, layer in filled_layers(cache)
        if n in layers and layer.keys.dtype != PLACEHOLDER_DTYPE
    ]


def evict(cache: Any, layers: AbstractSet[int]) -> None:
    """Put placeholders in for keys and values of some layers, or none if `check_cache` fails."""
    evicted = layers_with_keys(cache, layers)
    if evicted:
        check_cache(cache)
    for number in evicted:
        layer = cache.layers[number]
        if isinstance(layer, GroupedLayer):
            cache.layers[number] = _emptied(layer)
            continue
        row = placeholder_entries(layer.keys.shape[0], layer.keys.shape[-2], layer.keys.device)
        layer.keys, layer.values = row, row.clone()


def clear(cache: Any) -> None:
    """Free everything that a cache holds; it can be filled again. `check_cache` must pass."""
    check_cache(cache)
    for layer in cache.layers:
        layer.reset()  # of static layers this keeps the memory
        layer.keys = layer.values = None
        layer.is_initialized = False


def cache_bytes(cache: Any) -> int:
    """Bytes that a cache occupies: those of the storages of its tensors."""
    storages = {
        storage.data_ptr(): storage.nbytes()
        for _, layer in filled_layers(cache)
        for tensor in tensors_of(layer)
        for storage in (tensor.untyped_storage(),)
    }
    return sum(storages.values())


def _emptied(layer: GroupedLayer) -> Any:
    """Placeholders for the columns of a layer, in transformers' own kind of layer."""
    made = native_layer(layer)
    columns = layer.get_seq_length()
    cached = columns
    if made.is_sliding:
        made.cumulative_length = columns
        cached = min(columns, made.sliding_window - 1)
    row = placeholder_entries(len(layer.lengths), cached, layer.device)
    made.lazy_initialization(row, row)
    made.keys, made.values = row, row.clone()
    return made


@contextlib.contextmanager
def step(
    llm: Any,
    cache: Any,
    restore: Restore,
    past: Callable[[], Past | None],
    most_tokens: int = PREFILL_CHUNK_TOKENS,
) -> Iterator[None]:
    """Prepare the model and `cache` for one step; no mask changes until the block ends.

    Args:
        llm: The live model, an `ElasticLLM`.
        cache: The cache of the step, or None.
        restore: For attention blocks that the mask has restored and the cache lacks.
        past: Returns the tokens of the cache, or None if they are not known; called for a refill.
        most_tokens: Most tokens to run at once in a refill.
    """
    with llm.exclusive():
        if cache is None:
            yield
            return
        llm.track_cache(cache)
        update_cache(llm, cache, restore, past, most_tokens)
        absent = missing(cache)
        with llm.without({2 * number for number in absent}):
            yield


def update_cache(
    llm: Any,
    cache: Any,
    restore: Restore,
    past: Callable[[], Past | None],
    most_tokens: int = PREFILL_CHUNK_TOKENS,
    *,
    raise_levels: bool = True,
) -> None:
    """Update a cache to the model's mask, as `restore` selects; arguments as for `step`.

    Without `raise_levels`, a layer that is missing or below its level stays so.
    """
    removed = llm.removed_attention
    evict(cache, removed)
    levels = {n: llm.plan.cache_level(n) for n in range(llm.adapter.num_layers)}
    lower(cache, levels)
    read_back(cache, levels)
    if restore == "next_request" or not raise_levels:
        return
    if missing(cache) <= removed and not raised(cache, levels):
        return
    known = past()
    if known is None:
        raise UnsupportedCacheError(
            "An attention block or the level of its cache was restored, and its keys and values "
            "cannot be computed: the tokens of this cache are not known (it was given with the new "
            "tokens alone, or made from embeddings). Give all tokens, or use "
            "restore='next_request'."
        )
    refill(llm, cache, known, most_tokens)


def refill(llm: Any, cache: Any, past: Past, most_tokens: int = PREFILL_CHUNK_TOKENS) -> None:
    """Compute a cache again under the model's mask, in chunks that bound the workspace.

    Its content is freed first, so that memory never holds more than the new state. At most
    `most_tokens` tokens, of all sequences together, run at once.
    """
    clear(cache)
    batch, length = past.tokens.shape
    width = max(1, most_tokens // batch)
    decoder = llm.adapter.decoder(llm.model)
    name = cache_argument(decoder)
    for start in range(0, length, width):
        end = min(length, start + width)
        decoder(
            input_ids=past.tokens[:, start:end],
            attention_mask=past.attention_mask[:, :end],
            position_ids=past.position_ids[:, start:end],
            use_cache=True,
            **{name: cache},
        )


def positions_of(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions of tokens, counted from the first one that is not padding, (B, T)."""
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)


def cache_argument(module: torch.nn.Module) -> str:
    """The cache's argument name in this transformers version: ``cache`` or ``past_key_values``."""
    known = inspect.signature(module.forward).parameters
    return "cache" if "cache" in known else "past_key_values"
