"""A decode step of a live model: running it, and the bytes that it reads from memory."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from benchmarks.harness import Target, alternate, ratios
from rap_env.blocks import BlockMask
from rap_env.memory import PREFILL_CHUNK_TOKENS, MemoryModel
from rap_env.models.caches.kv_cache import cache_argument
from rap_env.models.live.elastic import ElasticLLM

ORDERS = ("even", "ffn", "attn")
"""Orders in which blocks are removed: attn and ffn in turn, only ffn, or attn before ffn."""

_OF_PROPORTIONAL = 0.9
"""Wanted part of the speed-up that is proportional to the bytes."""


class Decoding:
    """Sequences that a model continues greedily under one mask.

    The prompt is random: its content affects neither time nor bytes.

    Args:
        llm: The model.
        mask: The mask under which its cache is filled and read.
        batch_size: Number of sequences in the batch.
        context_tokens: Tokens in the cache before the first step.
    """

    def __init__(
        self, llm: ElasticLLM, mask: BlockMask, batch_size: int, context_tokens: int
    ) -> None:
        from transformers import DynamicCache

        self._llm, self._mask = llm, mask
        self._cache_name = cache_argument(llm.model)
        self.cache: Any = DynamicCache(config=llm.model.config)
        generator = torch.Generator().manual_seed(0)
        shape = (batch_size, context_tokens)
        prompt = torch.randint(llm.adapter.vocab_size, shape, generator=generator)
        self._next = prompt[:, -1:].to(llm.device)
        self._read(prompt.to(llm.device))

    def steps(self, number: int) -> None:
        """Generate a number of tokens."""
        for _ in range(number):
            self._read(self._next)

    def kv_bytes(self) -> int:
        """Bytes of keys and values of the kept attention blocks, as the tensors hold them."""
        gone = self._mask | self._llm.pruned
        return sum(
            tensor.nbytes
            for layer, held in enumerate(self.cache.layers)
            if 2 * layer not in gone
            for tensor in (held.keys, held.values)
        )

    def _read(self, tokens: torch.Tensor) -> None:
        """Run tokens, a chunk of `PREFILL_CHUNK_TOKENS` over the whole batch at a time."""
        width = max(1, PREFILL_CHUNK_TOKENS // tokens.shape[0])
        with torch.no_grad(), self._llm.masked(self._mask):
            for start in range(0, tokens.shape[1], width):
                output = self._llm.model(
                    input_ids=tokens[:, start : start + width],
                    use_cache=True,
                    logits_to_keep=1,
                    **{self._cache_name: self.cache},
                )
        self._next = output.logits[:, -1].argmax(-1, keepdim=True)


def decode_seconds(
    sides: Mapping[str, tuple[ElasticLLM, BlockMask]],
    context_tokens: int,
    steps: int,
    repeats: int,
    others: Mapping[str, Any] | None = None,
) -> dict[str, list[float]]:
    """Seconds of one decode step at batch 1 for several models and masks, measured in turn.

    Args:
        sides: Model and mask, by name.
        context_tokens: Tokens in the cache in the middle of the measurement.
        steps: Decode steps in one measurement.
        repeats: Measurements of each side.
        others: More calls to measure in turn with them; their seconds are those of one call.
    """
    context = max(1, context_tokens - steps * (repeats + 1) // 2)
    running = {name: Decoding(llm, mask, 1, context) for name, (llm, mask) in sides.items()}
    calls: dict[str, Any] = {
        name: lambda decoding=decoding: decoding.steps(steps) for name, decoding in running.items()
    }
    seconds = alternate({**calls, **(others or {})}, repeats)
    per_call = dict.fromkeys(sides, steps)
    return {n: [total / per_call.get(n, 1) for total in totals] for n, totals in seconds.items()}


def of_proportional(
    dense_s: Sequence[float], step_s: Sequence[float], share: float
) -> dict[str, float]:
    """The speed-up of a mask that removes a share of the bytes, relative to 1 / (1 - share)."""
    faster = ratios(dense_s, step_s)
    reached = {key: faster[key] * (1 - share) for key in ("median", "low", "high")}
    return {**reached, "repeats": faster["repeats"]}


def worst_target(what: str, sides: Iterable[Mapping[str, Any]]) -> Target:
    """The target for the mask, of several, with the least part of its proportional speed-up.

    Args:
        what: What the decoding is; the share of bytes that the mask removes is added.
        sides: ``of_proportional`` and ``bytes_share_removed`` of each mask.
    """
    worst = min(sides, key=lambda side: float(side["of_proportional"]["median"]))
    share = worst["bytes_share_removed"]
    return Target.of(
        f"(1 - x) tokens/s over dense, {what} (worst at x = {share:.0%})",
        worst["of_proportional"],
        at_least=_OF_PROPORTIONAL,
        against="the dense model",
    )


class MemoryTraffic:
    """Bytes that a decode step at batch 1 reads: each kept weight, stub and cache entry once.

    Of an embedding that is not tied to the head a token reads one row; a tied one is read once, as
    the head. All experts of a mixture count, even those that a token does not use.
    """

    def __init__(self, llm: ElasticLLM, context_tokens: int) -> None:
        memory = MemoryModel(llm)
        kv = memory.kv_bytes_by_layer(1, context_tokens).tolist()
        weights = memory.facts.block_param_bytes
        self.block_bytes: list[int] = [
            size + (kv[index // 2] if index % 2 == 0 else 0) for index, size in enumerate(weights)
        ]
        """Bytes of each block, its cache included, shape (2L,)."""
        self.stub_bytes = memory.facts.stub_bytes or (0,) * len(weights)
        """Bytes of each block's stub, (2L,)."""
        embedding = llm.model.get_input_embeddings().weight
        tied = llm.model.get_output_embeddings().weight is embedding
        skipped = 0 if tied else embedding.nbytes - embedding[0].nbytes
        self.rest_bytes: int = memory.facts.base_bytes - skipped
        """Bytes of head, norms and one row of the embedding."""

    def step_bytes(self, mask: BlockMask) -> int:
        """Bytes read for one token under `mask`."""
        kept = (size for index, size in enumerate(self.block_bytes) if index not in mask)
        return self.rest_bytes + sum(kept) + sum(self.stub_bytes[index] for index in mask)

    def share(self, mask: BlockMask) -> float:
        """Share of the dense model's bytes that `mask` removes."""
        return 1 - self.step_bytes(mask) / self.step_bytes(BlockMask())

    def mask(self, order: str, share: float) -> BlockMask:
        """The mask whose removed share is closest to `share`, with layers drawn by a fixed seed."""
        taken = _removal_order(order, len(self.block_bytes) // 2)
        masks = [BlockMask.of(*taken[:number]) for number in range(len(taken) + 1)]
        return min(masks, key=lambda mask: abs(self.share(mask) - share))


def _removal_order(order: str, layers: int) -> Sequence[int]:
    drawn = random.Random(0)
    attn = [2 * layer for layer in drawn.sample(range(layers), layers)]
    ffn = [2 * layer + 1 for layer in drawn.sample(range(layers), layers)]
    if order == "even":
        return [index for pair in zip(ffn, attn, strict=True) for index in pair]
    return ffn if order == "ffn" else [*attn, *ffn]
