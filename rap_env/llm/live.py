"""One step of a live model: its mask and a KV cache are brought together, then the model runs.

A mask changes between two steps (`ElasticLLM.apply`); each cache in use follows at its own next
step. A removed attention block has let go of its keys and values by then. One that is restored
lacks those of the tokens so far, and `Restore` says what happens:

===============  ============================  =======================================
Restore          Bytes                         Time
===============  ============================  =======================================
``refill``       its KV cache of all tokens    a pass of all tokens over all kept
                                               blocks, without the head
``next_request`` none until the cache is new   none
===============  ============================  =======================================

After a refill the state is that of a model that ran with the new mask from the start, in every
layer. Without one, keys and values that other layers computed under an older mask stay as they are:
that is what any mask change does to the tokens before it.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from rap_env.errors import UnknownNameError, UnsupportedCacheError
from rap_env.llm import kv
from rap_env.memory import PREFILL_CHUNK_TOKENS

if TYPE_CHECKING:
    from rap_env.llm.elastic import ElasticLLM

Restore = Literal["refill", "next_request"]
"""What a restored attention block does about the tokens that came before."""

RESTORES: tuple[Restore, ...] = get_args(Restore)


@dataclass(frozen=True)
class Past:
    """What a cache was made of.

    Attributes:
        tokens: (B, T).
        attention_mask: (B, T), 0 for padding.
        position_ids: (B, T).
    """

    tokens: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor


def check_restore(name: str) -> None:
    """Refuse an unknown way of restoring.

    Raises:
        UnknownNameError: There is no such way.
    """
    if name not in RESTORES:
        raise UnknownNameError("way of restoring attention blocks", name, RESTORES)


@contextlib.contextmanager
def step(
    llm: ElasticLLM,
    cache: Any,
    restore: Restore,
    past: Callable[[], Past | None],
    most_tokens: int = PREFILL_CHUNK_TOKENS,
) -> Iterator[None]:
    """The model as one step with `cache` needs it; no mask changes until the block ends.

    Args:
        llm: The live model.
        cache: The cache of the step, or None.
        restore: For attention blocks that the cache lacks and the mask has again.
        past: Gives what the cache was made of, or None if nobody knows; asked for a refill.
        most_tokens: Most tokens to run at once in a refill.

    Raises:
        UnsupportedCacheError: The cache cannot follow the mask.
    """
    with llm.exclusive():
        if cache is None:
            yield
            return
        llm.watch(cache)
        follow(llm, cache, restore, past, most_tokens)
        absent = kv.missing(cache)
        with llm.without({2 * number for number in absent}):
            yield


def follow(
    llm: ElasticLLM,
    cache: Any,
    restore: Restore,
    past: Callable[[], Past | None],
    most_tokens: int = PREFILL_CHUNK_TOKENS,
) -> None:
    """Bring a cache to the model's mask, as far as `restore` wants; arguments as for `step`."""
    gone = llm.removed_attention
    kv.let_go(cache, gone)
    back = kv.missing(cache) - gone
    if not back or restore == "next_request":
        return
    made_of = past()
    if made_of is None:
        raise UnsupportedCacheError(
            "An attention block came back, and its keys and values cannot be computed again: the "
            "tokens of this cache are not known (it was given with the new tokens alone, or made "
            "from embeddings). Give all tokens, or restore with 'next_request'."
        )
    refill(llm, cache, made_of, most_tokens)


def refill(
    llm: ElasticLLM, cache: Any, past: Past, most_tokens: int = PREFILL_CHUNK_TOKENS
) -> None:
    """Compute a cache anew under the model's mask, in chunks that bound the workspace.

    What it held is freed first, so that no more than the new state is ever in memory.

    Args:
        llm: The live model.
        cache: The cache; it is filled in its place.
        past: What it was made of.
        most_tokens: Most tokens, of all sequences together, to run at once.
    """
    kv.empty(cache)
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
    """Positions of tokens, counted from the first that is no padding, (B, T)."""
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)


def cache_argument(module: torch.nn.Module) -> str:
    """What this version of transformers calls the cache: ``cache`` or ``past_key_values``."""
    known = inspect.signature(module.forward).parameters
    return "cache" if "cache" in known else "past_key_values"
