"""A live model in the middle of generation, one token at a time with its KV cache."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from rap_env.blocks import BlockMask
from rap_env.llm.elastic import ElasticLLM
from rap_env.memory import PREFILL_CHUNK_TOKENS


class Decoding:
    """Sequences that a model under one mask goes on writing, greedily.

    The prompt is random tokens: what they say changes neither time nor bytes.

    Args:
        llm: The model.
        mask: The mask under which its cache is filled and read.
        batch_size: Sequences at once.
        context_tokens: Tokens in the cache before the first step.
    """

    def __init__(
        self, llm: ElasticLLM, mask: BlockMask, batch_size: int, context_tokens: int
    ) -> None:
        from transformers import DynamicCache

        self._llm, self._mask = llm, mask
        forward = inspect.signature(llm.model.forward).parameters
        self._cache_name = "cache" if "cache" in forward else "past_key_values"
        self.cache: Any = DynamicCache(config=llm.model.config)
        generator = torch.Generator().manual_seed(0)
        shape = (batch_size, context_tokens)
        prompt = torch.randint(llm.adapter.vocab_size, shape, generator=generator)
        self._next = prompt[:, -1:].to(llm.device)
        self._read(prompt.to(llm.device))

    def steps(self, number: int) -> None:
        """Write so many tokens."""
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
