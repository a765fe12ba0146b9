"""Predicted bytes of a mask on a live model: the memory model's peak bytes, and what comes on top.

Beyond `rap_env.memory`, a live model takes:

- the weights of removed blocks, where they stay resident;
- one layer's keys and values a second time: caches grow by copying, one layer at a time;
- 2 bytes a token and sequence for each removed attention block (see `rap_env.llm.placeholders`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from rap_env.blocks import BlockMask
from rap_env.costs import RequestCosts, request_costs
from rap_env.memory import MemoryModel
from rap_env.request import Request
from rap_env.runtime.batch_shape import BatchShape

if TYPE_CHECKING:
    from rap_env.llm.elastic import ElasticLLM

_PLACEHOLDER_BYTES = 2  # a token and sequence, for each removed attention block
_LOGIT_BYTES = 4  # logits are float32
_CACHED_SHAPES = 256

_PASS_FACTOR = 2.5  # passes took up to 2.3 times the estimated workspace, in bfloat16 on a CPU


@dataclass(frozen=True)
class PassSize:
    """Tokens of the next pass through the model. ``PassSize()`` is an unknown pass.

    Attributes:
        tokens: Tokens that the pass runs, of all sequences together; 0 if unknown.
        growth_tokens: Tokens that the KV cache holds more afterwards, padding included.
    """

    tokens: int = 0
    growth_tokens: int = 0


UNKNOWN_PASS = PassSize()
"""A pass whose size is not known."""


@dataclass(frozen=True)
class PassEstimate:
    """Most bytes that one pass through the model allocates, if it reuses no freed memory.

    Attributes:
        workspace: Bytes of activations, logits and copies of a layer's cache.
        growth: Bytes of keys and values that stay.
    """

    workspace: int = 0
    growth: int = 0

    @property
    def total(self) -> int:
        """Workspace and growth."""
        return self.workspace + self.growth


@dataclass(frozen=True, eq=False)
class _ShapeCosts:
    """Bytes of one batch shape under one residency.

    Attributes:
        costs: Bytes by the memory model; a removed block frees its bytes less what stays of it.
        cache_bytes: Keys and values of each layer, (L,).
    """

    costs: RequestCosts
    cache_bytes: tuple[int, ...]

    def peak_bytes(self, removed: Collection[int]) -> int:
        layers = enumerate(self.cache_bytes)
        copied = max((size for layer, size in layers if 2 * layer not in removed), default=0)
        return self.costs.peak_bytes(removed) + copied


class MemoryEstimator:
    """Predicts the bytes of masks on a live model."""

    def __init__(self, llm: ElasticLLM) -> None:
        self._llm = llm
        self.memory = MemoryModel(llm)
        facts = self.memory.facts
        windows = (facts.max_positions if w is None else w for w in facts.kv_window_tokens)
        self._layer_kinds = set(zip(facts.kv_bytes_per_token, windows, strict=True))
        self._cached_costs = lru_cache(maxsize=_CACHED_SHAPES)(self._compute_costs)

    def peak_bytes(self, mask: BlockMask, shape: BatchShape) -> int:
        """Most bytes that the model takes with a mask while it serves a batch.

        Raises:
            InvalidRequestError: The model cannot serve so many tokens.
        """
        return self._costs(shape).peak_bytes(mask.indices)

    def workspace_bytes(self, shape: BatchShape) -> int:
        """The memory model's estimate for activations and logits, plus one copied cache layer."""
        batch, tokens = shape.at_least_one
        layer = max(batch * min(tokens, window) * size for size, window in self._layer_kinds)
        return self.memory.workspace_bytes(shape.request(1)) + layer

    def refill_bytes(self, mask: BlockMask, shape: BatchShape) -> int:
        """Bytes that a cache refill of all rows may take beyond the workspace of its passes.

        The caches grow from nothing, each time into new memory, and the old copies leave holes in
        the heap: up to half of the final bytes were measured.
        """
        layers = enumerate(self._costs(shape).cache_bytes)
        return sum(size for layer, size in layers if 2 * layer not in mask.indices) // 2

    def pass_estimate(self, mask: BlockMask, shape: BatchShape, size: PassSize) -> PassEstimate:
        """Most bytes that a pass allocates."""
        copied = max(self._costs(shape).cache_bytes)
        if size.tokens == 0:
            return PassEstimate(workspace=copied)
        facts = self.memory.facts
        activations = self.memory.workspace_bytes(Request(1, size.tokens, 1))
        logits = shape.batch_size * facts.vocab_size * _LOGIT_BYTES
        per_token = sum(
            size_bytes
            for layer, size_bytes in enumerate(facts.kv_bytes_per_token)
            if 2 * layer not in mask.indices
        )
        workspace = int(_PASS_FACTOR * activations) + logits + copied
        return PassEstimate(workspace, size.growth_tokens * per_token)

    def shrink_to_fit(
        self, mask: BlockMask, order: Iterable[int], shape: BatchShape, limit_bytes: int
    ) -> BlockMask | None:
        """Remove more blocks, in `order`, until a mask fits a limit; None if it never does.

        Blocks whose removal frees nothing are skipped.
        """
        costs = self._costs(shape)
        removed = set(mask.indices)
        need = costs.peak_bytes(removed)
        skipped = []
        for index in order:
            if need <= limit_bytes:
                break
            if index in removed:
                continue
            without = costs.peak_bytes(removed | {index})
            if without < need:
                removed.add(index)
                need = without
            else:
                skipped.append(index)
        if need > limit_bytes and skipped:  # together they may free the last FFN block's workspace
            removed.update(skipped)
            need = costs.peak_bytes(removed)
        return BlockMask(frozenset(removed)) if need <= limit_bytes else None

    def freed_bytes(self, shape: BatchShape) -> tuple[int, ...]:
        """Bytes that the removal of each block frees, (2L,)."""
        return self._costs(shape).costs.freed

    def _costs(self, shape: BatchShape) -> _ShapeCosts:
        return self._cached_costs(shape, self._llm.residency == "resident")

    def _compute_costs(self, shape: BatchShape, resident: bool) -> _ShapeCosts:
        batch, tokens = shape.at_least_one
        costs = request_costs(self.memory, batch, tokens)
        freed = costs.freed_bytes.copy()
        freed[0::2] -= _PLACEHOLDER_BYTES * batch * tokens
        if resident:
            freed -= np.array(self.memory.facts.block_param_bytes)
        layers = self.memory.kv_bytes_by_layer(batch, tokens).tolist() if shape else [0]
        return _ShapeCosts(replace(costs, freed_bytes=freed), tuple(layers))
