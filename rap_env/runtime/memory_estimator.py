"""What a mask needs on a live model: the memory model's peak bytes, and what only a live one takes.

Beyond `rap_env.memory`, a live model takes:

- the weights of removed blocks, where they stay resident;
- one layer's keys and values a second time: caches grow by copying, a layer at a time;
- 2 bytes a token and sequence for each removed attention block (see `rap_env.llm.removed`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from rap_env.blocks import BlockMask
from rap_env.costs import RequestCosts, request_costs
from rap_env.memory import MemoryModel
from rap_env.request import Request
from rap_env.runtime.batch_shape import BatchShape

if TYPE_CHECKING:
    from rap_env.llm.elastic import ElasticLLM

_PLACE_BYTES = 2
_LOGIT_BYTES = 4
_KEPT_TABLES = 256


_PASS_SHARE = 2.5  # passes took up to 2.3 times the estimated workspace, in bfloat16 on a CPU


@dataclass(frozen=True)
class PassEstimate:
    """Most bytes that one pass through the model asks for, if it uses no freed memory again.

    Attributes:
        workspace: For activations, logits and copies of a layer's cache.
        growth: For keys and values that stay.
    """

    workspace: int = 0
    growth: int = 0

    @property
    def total(self) -> int:
        """Both."""
        return self.workspace + self.growth


@dataclass(frozen=True, eq=False)
class _Table:
    """Bytes of one shape under one residency.

    Attributes:
        costs: What the memory model says.
        kept_bytes: What stays of each removed block, weights and places, (2L,).
        copied_bytes: Keys and values of each layer, (L,).
    """

    costs: RequestCosts
    kept_bytes: tuple[int, ...]
    copied_bytes: tuple[int, ...]

    def bytes(self, removed: Collection[int]) -> int:
        kept = sum(self.kept_bytes[index] for index in removed)
        copied = max(
            (n for layer, n in enumerate(self.copied_bytes) if 2 * layer not in removed), default=0
        )
        return self.costs.peak_bytes(removed) + kept + copied


class MemoryEstimator:
    """Counts what masks need on a live model.

    Args:
        llm: The live model; its residency may change.

    Attributes:
        memory: Its byte arithmetic.
    """

    def __init__(self, llm: ElasticLLM) -> None:
        self._llm = llm
        self.memory = MemoryModel(llm)
        facts = self.memory.facts
        windows = (facts.max_positions if w is None else w for w in facts.kv_window_tokens)
        self._layers = set(zip(facts.kv_bytes_per_token, windows, strict=True))
        self._table = lru_cache(maxsize=_KEPT_TABLES)(self._count)

    def peak_bytes(self, mask: BlockMask, shape: BatchShape) -> int:
        """Most bytes that the model takes with a mask while it serves a shape.

        Raises:
            InvalidRequestError: The model cannot serve so many tokens.
        """
        return self._now(shape).bytes(mask.indices)

    def workspace_bytes(self, shape: BatchShape) -> int:
        """What the memory model expects of activations and logits, and of copying a layer."""
        batch, tokens = shape.at_least_one
        layer = max(batch * min(tokens, window) * size for size, window in self._layers)
        return self.memory.workspace_bytes(shape.request(1)) + layer

    def refill_bytes(self, mask: BlockMask, shape: BatchShape) -> int:
        """What a refill of all rows may take beyond the workspace of its passes.

        Its caches grow from nothing, each time into a new place, and leave the old ones behind
        as holes in the heap: up to half of the final bytes were measured.
        """
        copied = self._now(shape).copied_bytes
        kept = sum(n for layer, n in enumerate(copied) if 2 * layer not in mask.indices)
        return kept // 2

    def coming(
        self, mask: BlockMask, shape: BatchShape, tokens: int, growth_tokens: int
    ) -> PassEstimate:
        """What a pass asks for.

        Args:
            mask: The mask that it runs with.
            shape: What is served.
            tokens: Tokens that it runs, of all sequences together; 0 if that is not known.
            growth_tokens: Tokens that caches hold more afterwards, padding included.
        """
        copied = max(self._now(shape).copied_bytes)
        if tokens == 0:
            return PassEstimate(workspace=copied)
        facts = self.memory.facts
        activations = self.memory.workspace_bytes(Request(1, tokens, 1))
        logits = shape.batch_size * facts.vocab_size * _LOGIT_BYTES
        kept = sum(
            size
            for layer, size in enumerate(facts.kv_bytes_per_token)
            if 2 * layer not in mask.indices
        )
        return PassEstimate(int(_PASS_SHARE * activations) + logits + copied, growth_tokens * kept)

    def fitted(
        self, mask: BlockMask, order: Iterable[int], shape: BatchShape, limit_bytes: int
    ) -> BlockMask | None:
        """A mask, with more blocks removed until it needs no more than a limit.

        Blocks whose removal frees nothing are passed over.

        Args:
            mask: Where to begin.
            order: Indices of blocks, those to be removed first at the front.
            shape: What is to be served.
            limit_bytes: The limit.

        Returns:
            The first mask that fits, or None if none does.
        """
        table = self._now(shape)
        removed = set(mask.indices)
        need = table.bytes(removed)
        passed_over = []
        for index in order:
            if need <= limit_bytes:
                break
            if index in removed:
                continue
            without = table.bytes(removed | {index})
            if without < need:
                removed.add(index)
                need = without
            else:
                passed_over.append(index)
        if need > limit_bytes and passed_over:  # together they may free the last FFN's workspace
            removed.update(passed_over)
            need = table.bytes(removed)
        return BlockMask(frozenset(removed)) if need <= limit_bytes else None

    def freed_bytes(self, shape: BatchShape) -> tuple[int, ...]:
        """What the removal of each block frees, (2L,)."""
        table = self._now(shape)
        pairs = zip(table.costs.freed, table.kept_bytes, strict=True)
        return tuple(freed - kept for freed, kept in pairs)

    def _now(self, shape: BatchShape) -> _Table:
        return self._table(shape, self._llm.residency == "resident")

    def _count(self, shape: BatchShape, resident: bool) -> _Table:
        batch, tokens = shape.at_least_one
        costs = request_costs(self.memory, batch, tokens)
        params = self.memory.facts.block_param_bytes
        layers = self.memory.kv_bytes_by_layer(batch, tokens).tolist() if shape else []
        places = _PLACE_BYTES * batch * tokens
        kept = tuple(
            (weights if resident else 0) + (places if index % 2 == 0 else 0)
            for index, weights in enumerate(params)
        )
        return _Table(costs, kept, tuple(layers or [0]))
