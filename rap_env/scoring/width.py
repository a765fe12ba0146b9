"""How many masks are run at once: one on a CPU, more where that leaves a device idle."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from rap_env.errors import InvalidRequestError
from rap_env.llm.device import synchronise
from rap_env.llm.elastic import ElasticLLM
from rap_env.llm.partial_forward import PartialForward
from rap_env.scoring.loss import HEAD_TOKENS

_MOST = 64
_CLEAR_GAIN = 1.1
_REPEATS = 5
_WORKING_STATES = 24  # a block's inner activations, in hidden states, roughly
_ATTN_STATES = 14
_EAGER_SCORES = 4
_SOFTMAX_ROWS = 48  # of the vocabulary's size in float32, at one time
_FLOAT32 = 4  # bytes
_CACHE_SHARE = 8  # of what a memory cap leaves goes to one scorer's cache
_SCORERS = 2  # one round of a search may use so many on one model, each with a cache
_SLACK_BYTES = 2**18


@dataclass(frozen=True)
class AtOnce:
    """What is run at once.

    Attributes:
        width: Most states that share a batch.
        in_flight: Masks that advance together.
        cache_bytes: Most bytes of hidden states kept for later masks.
    """

    width: int
    in_flight: int
    cache_bytes: int


def masks_at_once(
    llm: ElasticLLM, ids: torch.Tensor, cache_bytes: int, width: int | None
) -> AtOnce:
    """How many masks to run at once on a text.

    A CPU is full with one mask's batch (two masks in one batch were no faster), so there each
    has its own, which keeps scores bit for bit those of single passes. On an accelerator the
    width is measured. A model that is streamed under a memory cap takes as many masks through
    each of its layers as the cap allows, each in a batch of its own.

    Args:
        llm: The live model.
        ids: The first batch of the text, shape (windows, T).
        cache_bytes: Bytes that hidden states may take where nothing else bounds them.
        width: Most masks that share a batch, or None to choose.

    Raises:
        InvalidRequestError: The width is no whole number of at least 1, or a memory cap leaves
            no room for a single mask.
    """
    if width is not None and (isinstance(width, bool) or int(width) != width or width < 1):
        raise InvalidRequestError(
            f"masks_together must be a whole number of at least 1, or None, not {width!r}."
        )
    spare = llm.spare_bytes
    if spare is not None:
        return _under_cap(llm, ids, cache_bytes, width or 1, spare)
    if width is None:
        width = 1 if llm.device.type == "cpu" else _fastest(llm, ids)
    return AtOnce(width, width, cache_bytes)


def _under_cap(
    llm: ElasticLLM, ids: torch.Tensor, cache_bytes: int, width: int, spare: int
) -> AtOnce:
    """As many masks as memory takes; each holds what enters a block and what leaves it."""
    state_bytes = ids.numel() * llm.facts.hidden_size * llm.facts.itemsize
    least = max(width * _block_bytes(llm, ids), _head_bytes(llm, ids)) + _SLACK_BYTES
    free = spare - least
    if free < 2 * state_bytes:
        raise InvalidRequestError(
            f"Beside the weights of {llm.name}, max_memory_bytes leaves {spare:,} bytes, and one "
            f"mask on {len(ids)} x {ids.shape[1]} tokens needs {least + 2 * state_bytes:,}; raise "
            "it by the difference, or measure on shorter windows or with a smaller batch_tokens."
        )
    cache = min(cache_bytes, free // _CACHE_SHARE)
    return AtOnce(width, max(1, (free - _SCORERS * cache) // (2 * state_bytes)), cache)


def _block_bytes(llm: ElasticLLM, ids: torch.Tensor) -> int:
    """Inner activations of one block, from above (6 to 18 hidden states were measured)."""
    facts, (rows, length) = llm.facts, ids.shape
    attn = _ATTN_STATES * facts.hidden_size * facts.itemsize
    if getattr(llm.model.config, "_attn_implementation", None) == "eager":
        heads = int(llm.adapter.config.num_attention_heads)
        attn += _EAGER_SCORES * heads * length * _FLOAT32
    ffn = (4 * facts.hidden_size + 5 * facts.ffn_width) * facts.itemsize
    masks = 2 * rows * length * length * facts.itemsize  # one for each kind of layer
    return ids.numel() * max(attn, ffn) + masks


def _head_bytes(llm: ElasticLLM, ids: torch.Tensor) -> int:
    """Logits of a piece of the text, their softmax, and the states that they are made from."""
    facts = llm.facts
    capped = getattr(llm.adapter.config, "final_logit_softcapping", None) is not None
    logits = min(HEAD_TOKENS, ids.numel()) * facts.vocab_size * facts.itemsize
    softmax = _SOFTMAX_ROWS * facts.vocab_size * _FLOAT32
    states = 2 * ids.numel() * facts.hidden_size * _FLOAT32
    return (3 if capped else 1) * logits + softmax + states


def _fastest(llm: ElasticLLM, ids: torch.Tensor) -> int:
    """The width at which a block in the middle of the model takes least time for each mask."""
    partial = PartialForward(llm)
    state = partial.enter(ids)
    step = partial.steps[len(partial.steps) // 2]
    free_bytes = torch.cuda.mem_get_info(llm.device)[0] if llm.device.type == "cuda" else 2**32
    most = min(_MOST, free_bytes // (2 * _WORKING_STATES * state.nbytes))
    best, best_s, width = 1, float("inf"), 1
    while width <= max(1, most):
        spent = _seconds(partial, step, state.repeat(width, 1, 1)) / width
        if spent * _CLEAR_GAIN < best_s:
            best, best_s = width, spent
        width *= 2
    return best


def _seconds(partial: PartialForward, step: tuple[int, ...], state: torch.Tensor) -> float:
    """The least of several timings of a step, the first run not counted."""
    times = []
    for _ in range(_REPEATS + 1):
        synchronise(state.device)
        began = time.perf_counter()
        partial.run(step, state)
        synchronise(state.device)
        times.append(time.perf_counter() - began)
    return min(times[1:])
