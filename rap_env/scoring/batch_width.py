"""Chooses how many masks share a batch: one on a CPU, more where one leaves a device idle."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rap_env.errors import InvalidRequestError
from rap_env.models.caches.attention import attention_name
from rap_env.models.device import free_bytes
from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.weights.bfloat16_products import extra_bytes
from rap_env.scoring.plan_runner import tokens_at_once

_MOST = 64
_FILLING_TOKENS = 2**14  # of a batch that keeps a large GPU busy
_WORKING_STATES = 24  # a block's inner activations, in hidden states, roughly
_ATTN_STATES = 14
_EAGER_SCORES = 4
_SOFTMAX_COPIES = 3  # of the float32 logits, at one time
_FLOAT32 = 4  # bytes
_CACHE_SHARE = 8  # one scorer's cache gets 1/8 of the bytes that a memory cap leaves
_SCORERS = 2  # scorers that one round of a search may use on one model, each with a cache
_SLACK_BYTES = 2**18


@dataclass(frozen=True)
class BatchWidth:
    """Number of masks that run together.

    Attributes:
        masks: Most masks whose states share a batch.
        in_flight: Masks that advance through the model together.
        cache_bytes: Most bytes of hidden states kept for later masks.
    """

    masks: int
    in_flight: int
    cache_bytes: int


def choose_batch_width(
    llm: ElasticLLM, ids: torch.Tensor, cache_bytes: int, width: int | None
) -> BatchWidth:
    """Choose how many masks run together on a text.

    One mask's batch saturates a CPU (two masks in one batch were no faster), so on a CPU each
    mask has its own batch, which keeps scores bit for bit those of single passes. On an
    accelerator as many masks share a batch as fill it. A model that is streamed under a memory cap
    runs as many masks through each of its layers as the cap allows, each in its own batch. `ids` is
    the first batch of the text, (windows, T); `cache_bytes` the most bytes of hidden states, unless
    a memory cap allows less; a `width` of None is chosen.

    Raises:
        InvalidRequestError: A memory cap is too small for a single mask.
    """
    spare = llm.spare_bytes
    if spare is not None:
        return _under_cap(llm, ids, cache_bytes, width or 1, spare)
    if width is None:
        width = 1 if llm.device.type == "cpu" else _filling(llm, ids)
    return BatchWidth(width, width, cache_bytes)


def _under_cap(
    llm: ElasticLLM, ids: torch.Tensor, cache_bytes: int, width: int, spare: int
) -> BatchWidth:
    """The most masks that fit in memory; each mask holds a block's input and its output."""
    state_bytes = ids.numel() * llm.facts.hidden_size * llm.facts.itemsize
    least = max(width * _block_bytes(llm, ids), _head_bytes(llm, ids)) + _SLACK_BYTES
    free = spare - least
    if free < 2 * state_bytes:
        raise InvalidRequestError(
            f"max_memory_bytes leaves {spare:,} bytes besides the weights of {llm.name}, but one "
            f"mask on {len(ids)} x {ids.shape[1]} tokens needs {least + 2 * state_bytes:,}; raise "
            "max_memory_bytes by the difference, use shorter windows or a smaller batch_tokens."
        )
    cache = min(cache_bytes, free // _CACHE_SHARE)
    return BatchWidth(width, max(1, (free - _SCORERS * cache) // (2 * state_bytes)), cache)


def _block_bytes(llm: ElasticLLM, ids: torch.Tensor) -> int:
    """Upper bound of one block's inner activations (6 to 18 hidden states were measured)."""
    facts, (rows, length) = llm.facts, ids.shape
    attn = _ATTN_STATES * facts.hidden_size * facts.itemsize
    if attention_name(llm.model) == "eager":
        heads = int(llm.adapter.config.num_attention_heads)
        attn += _EAGER_SCORES * heads * length * _FLOAT32
    ffn = (4 * facts.hidden_size + 5 * facts.ffn_width) * facts.itemsize
    masks = 2 * rows * length * length * facts.itemsize  # one for each kind of layer
    widths = facts.hidden_size, max(facts.hidden_size, facts.ffn_width)
    products = (extra_bytes(llm.device, llm.dtype, ids.numel(), *w) for w in (widths, widths[::-1]))
    return ids.numel() * max(attn, ffn) + masks + max(products)


def _head_bytes(llm: ElasticLLM, ids: torch.Tensor) -> int:
    """Bytes of a piece's logits, of their softmax, and of the states they are computed from."""
    facts = llm.facts
    capped = getattr(llm.adapter.config, "final_logit_softcapping", None) is not None
    most, rows = tokens_at_once(llm.device, facts.vocab_size)
    logits = min(most, ids.numel()) * facts.vocab_size * facts.itemsize
    softmax = _SOFTMAX_COPIES * min(rows, ids.numel()) * facts.vocab_size * _FLOAT32
    states = 2 * ids.numel() * facts.hidden_size * _FLOAT32
    product = extra_bytes(
        llm.device, llm.dtype, min(most, ids.numel()), facts.hidden_size, facts.vocab_size
    )
    return (3 if capped else 1) * logits + softmax + states + product


def _filling(llm: ElasticLLM, ids: torch.Tensor) -> int:
    """The masks whose batch fills an accelerator and its memory; a power of two.

    By sizes alone: a width that is timed varies between runs, and with it the rounding of scores.
    """
    state_bytes = ids.numel() * llm.facts.hidden_size * llm.facts.itemsize
    within = free_bytes(llm.device) // (2 * _WORKING_STATES * state_bytes)
    most = min(_MOST, _FILLING_TOKENS // ids.numel(), within)
    return 1 << max(0, most.bit_length() - 1)
