"""What one decode step reads from memory, and masks that take a share of it away."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rap_env.blocks import BlockMask
from rap_env.memory import MemoryModel

if TYPE_CHECKING:
    from rap_env.llm.elastic import ElasticLLM

ORDERS = ("even", "ffn", "attn")
"""How blocks are taken: attn and ffn in turn, ffn alone, or attn first and then ffn."""


class Traffic:
    """Bytes that a decode step at batch 1 reads: each kept weight, stub and cache entry once.

    Of an embedding that is not also the head a token reads one row; a tied one is read once, as
    the head. All experts of a mixture count, also those that a token does not visit.

    Args:
        llm: The model.
        context_tokens: Tokens in the cache.
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
        """Bytes of what stands in each block's place once it is removed, (2L,)."""
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
        """Share of the dense model's bytes that `mask` takes away."""
        return 1 - self.step_bytes(mask) / self.step_bytes(BlockMask())

    def mask(self, order: str, share: float) -> BlockMask:
        """The mask that comes nearest to taking `share` away, layers drawn once and for all.

        Args:
            order: One of `ORDERS`.
            share: The share, from 0 to 1.
        """
        taken = _order(order, len(self.block_bytes) // 2)
        masks = [BlockMask.of(*taken[:number]) for number in range(len(taken) + 1)]
        return min(masks, key=lambda mask: abs(self.share(mask) - share))


def _order(order: str, layers: int) -> Sequence[int]:
    drawn = random.Random(0)
    attn = [2 * layer for layer in drawn.sample(range(layers), layers)]
    ffn = [2 * layer + 1 for layer in drawn.sample(range(layers), layers)]
    if order == "even":
        return [index for pair in zip(ffn, attn, strict=True) for index in pair]
    return ffn if order == "ffn" else [*attn, *ffn]
