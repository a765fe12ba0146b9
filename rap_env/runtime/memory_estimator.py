"""Predicted bytes of a plan on a live model, for a batch at its largest and for the next pass.

Beyond the peak bytes of `rap_env.memory`, a live model takes:

- one layer's keys and values a second time: where rows join or leave and where quantised
  caches grow, caches are copied, one layer at a time;
- 2 bytes a token and sequence for each removed attention block (see
  `rap_env.models.caches.placeholders`);
- the tail of a grouped cache for each row that the batch has while its rows are still short.

The workspace is that of passes of at most `chunk_tokens` tokens, as the scheduler runs them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from rap_env.levels import GROUP_TOKENS, SINK_GROUPS, CacheLevel
from rap_env.memory import PREFILL_CHUNK_TOKENS, MemoryModel
from rap_env.plan import Plan
from rap_env.request import Request

if TYPE_CHECKING:
    from rap_env.models.live.elastic import ElasticLLM


_PLACEHOLDER_BYTES = 2  # a token and sequence, for each removed attention block
_LOGIT_BYTES = 4  # logits are float32
_CACHED = 1024  # results for pairs of a plan and a shape
# Of 32 tokens in all layers, native: lowering one took up to 5.8 of them in bfloat16 on a CPU, and
# one may be on its way into the store.
_LOWERING_BLOCKS = 7
# Passes took up to 2.3 times the estimated workspace, in bfloat16 on a CPU.
_PASS_FACTOR = 2.5


@dataclass(frozen=True)
class PassSize:
    """Tokens of the next pass through the model. ``PassSize()`` is an unknown pass.

    Attributes:
        tokens: Tokens that the pass runs, of all sequences together; 0 if unknown.
        growth_tokens: Tokens that the KV cache holds more afterwards, padding included.
        prefills: Whether a prompt is prefilled in this pass or may be in the next ones.
    """

    tokens: int = 0
    growth_tokens: int = 0
    prefills: bool = True


UNKNOWN_PASS = PassSize()
"""A pass whose size is not known."""


@dataclass(frozen=True)
class BatchShape:
    """A batch at its largest. ``BatchShape()`` is an empty batch, and false.

    Attributes:
        batch_size: Sequences in the batch.
        seq_len_tokens: Tokens of each of them, padding included.
        rows: Most sequences at any time, at least `batch_size`: the batch may have more of
            them while they are shorter, and a cache in groups takes some bytes for each.
        longest_tokens: Tokens of the longest sequence at its end, without padding; it may be
            longer than those of the largest batch. By default `seq_len_tokens`.
        kept_bytes: Bytes of caches in memory beside those of the batch.
        max_delta_nll: The strictest floor of its requests, nats per token.
    """

    batch_size: int = 0
    seq_len_tokens: int = 0
    rows: int = 0
    longest_tokens: int = field(default=0, repr=False)
    kept_bytes: int = field(default=0, repr=False)
    max_delta_nll: float = field(default=math.inf, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", max(self.rows, self.batch_size))
        if not self.longest_tokens:
            object.__setattr__(self, "longest_tokens", self.seq_len_tokens)

    def __bool__(self) -> bool:
        return self.batch_size > 0

    @property
    def tokens(self) -> int:
        """Tokens of all sequences together, padding included."""
        return self.batch_size * self.seq_len_tokens

    @property
    def at_least_one(self) -> tuple[int, int]:
        """Batch size and tokens, each at least 1, as the memory model requires."""
        return max(1, self.batch_size), max(1, self.seq_len_tokens)

    def request(self, budget_bytes: int) -> Request:
        """A request of this size with a budget; one token for an empty batch."""
        return Request(*self.at_least_one, budget_bytes=max(1, budget_bytes))

    @classmethod
    def of(cls, rows: Iterable[tuple[int, int]], *, uniform: bool = False) -> BatchShape:
        """The largest shape that a left-padded batch will reach.

        All rows grow by a token a step. A row leaves when it has no tokens to come, and
        padding that all other rows share is removed then. So the batch is largest just before
        some row leaves: the rows still present x tokens of the longest of them.

        Args:
            rows: Cached tokens and tokens to come, for each row.
            uniform: Count all rows at the greatest final length instead. The result is
                larger, and also holds where the bytes of a row do not grow with its tokens
                (sliding windows).

        Example:
            Seven rows of 100 tokens with 10 to come, and one with 900 to come:

            >>> rows = [(100, 10)] * 7 + [(100, 900)]
            >>> BatchShape.of(rows), BatchShape.of(rows, uniform=True).seq_len_tokens
            (BatchShape(batch_size=1, seq_len_tokens=1000, rows=8), 1000)
        """
        most, longest, latest, best, count = 0, 0, 0, cls(), 0
        for count, (cached, to_come) in enumerate(
            sorted(rows, key=lambda row: row[1], reverse=True), start=1
        ):
            longest = max(longest, cached)
            latest = max(latest, cached + to_come)
            final = longest + to_come
            if uniform:
                best = cls(count, max(best.seq_len_tokens, final))
            elif count * final > most:
                most, best = count * final, cls(count, final)
        return replace(best, rows=count, longest_tokens=latest)


EMPTY_BATCH = BatchShape()
"""No sequence at all."""


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


class MemoryEstimator:
    """Predicts the bytes of plans on a live model.

    Args:
        llm: The live model.
        chunk_tokens: Most tokens that one pass through the model runs.

    Attributes:
        lowering_bytes: Most bytes beside a kept block while it is lowered.
    """

    def __init__(self, llm: ElasticLLM, chunk_tokens: int = PREFILL_CHUNK_TOKENS) -> None:
        self._llm = llm
        self.memory = MemoryModel(llm, min(chunk_tokens, PREFILL_CHUNK_TOKENS))
        self._of_policies = MemoryModel(llm)
        facts = self.memory.facts
        windows = (facts.max_positions if w is None else w for w in facts.kv_window_tokens)
        self.lowering_bytes = _LOWERING_BLOCKS * GROUP_TOKENS * sum(facts.kv_bytes_per_token)
        self._layer_kinds = set(zip(facts.kv_bytes_per_token, windows, strict=True))
        self._cached_peak = lru_cache(maxsize=_CACHED)(self._compute_peak)
        self._cache_sizes = lru_cache(maxsize=_CACHED)(self._compute_cache_sizes)

    def peak_bytes(self, plan: Plan, shape: BatchShape) -> int:
        """Most bytes that the model takes with a plan while it serves a batch.

        Raises:
            InvalidRequestError: The model cannot serve so many tokens.
        """
        return self._cached_peak(plan, shape)

    def workspace_bytes(self, shape: BatchShape) -> int:
        """The memory model's estimate for activations and logits, plus one copied cache layer."""
        batch, tokens = shape.at_least_one
        layer = max(batch * min(tokens, window) * size for size, window in self._layer_kinds)
        return self.memory.workspace_bytes(shape.request(1)) + layer

    def surcharge_bytes(self, shape: BatchShape, plan: Plan | None = None) -> int:
        """Bytes that a plan takes beyond those with which policies reckon; negative if fewer.

        Policies reckon with the memory model's longest passes and with what a request needs
        alone. Without a plan, what every plan takes beyond that.
        """
        request = shape.request(1)
        if plan is not None:
            return self.peak_bytes(plan, shape) - self._of_policies.peak_bytes(plan, request)
        longest_pass = self._of_policies.workspace_bytes(request)
        return self.memory.workspace_bytes(request) - longest_pass + shape.kept_bytes

    def pass_estimate(self, plan: Plan, shape: BatchShape, size: PassSize) -> PassEstimate:
        """Most bytes that a pass allocates."""
        copied = max(self._cache_sizes(plan, shape)) if shape else 0
        if size.tokens == 0:
            return PassEstimate(workspace=copied)
        activations = self.memory.workspace_bytes(Request(1, size.tokens, 1))
        logits = shape.batch_size * self.memory.facts.vocab_size * _LOGIT_BYTES
        workspace = int(_PASS_FACTOR * activations) + logits + copied
        if size.prefills:
            workspace += self._window_bytes(plan, shape)
        return PassEstimate(workspace, self._growth_bytes(plan, shape, size.growth_tokens))

    def room_for_kept(
        self,
        plan: Plan,
        shape: BatchShape,
        size: PassSize,
        *,
        budget_bytes: int,
        margin_bytes: int,
        needed_bytes: int,
    ) -> int:
        """Bytes that may be kept beside a batch with a plan; may be negative.

        That is what the batch at its largest leaves, and what the next pass leaves of what is
        used now; lowering what is kept, between two passes, fits in either, so that it never
        takes more than the limit that held when it began.

        Args:
            plan: The plan.
            shape: The batch.
            size: Tokens of the next pass.
            budget_bytes: The budget.
            margin_bytes: What is reserved for what predictions miss.
            needed_bytes: Measured bytes without those that are kept.
        """
        margin_bytes += max(0, self.lowering_bytes - self.workspace_bytes(shape))
        beside_batch = budget_bytes - margin_bytes - self.peak_bytes(plan, shape)
        estimate = self.pass_estimate(plan, shape, size)
        pass_bytes = estimate.growth + max(estimate.workspace, self.lowering_bytes)
        return min(beside_batch, budget_bytes - needed_bytes - pass_bytes)

    def shrink_to_fit(
        self, plan: Plan, order: Iterable[int], shape: BatchShape, limit_bytes: int
    ) -> Plan | None:
        """Remove more blocks, in `order`, until a plan fits a limit; None if it never does.

        Blocks whose removal frees nothing are skipped.
        """
        need, skipped = self.peak_bytes(plan, shape), []
        for index in order:
            if need <= limit_bytes:
                break
            smaller = plan.without(index)
            if (least := self.peak_bytes(smaller, shape)) < need:
                plan, need = smaller, least
            else:
                skipped.append(index)
        if need > limit_bytes and skipped:  # without all FFN blocks, the workspace is smaller
            plan = plan.without(*skipped)
        return plan if self.peak_bytes(plan, shape) <= limit_bytes else None

    def freed_bytes(self, shape: BatchShape, plan: Plan = Plan()) -> tuple[int, ...]:
        """Bytes that the removal of each block frees from its level in a plan, (2L,)."""
        facts = self.memory.facts
        batch, tokens = shape.at_least_one
        freed = self.memory.freed_bytes(shape.request(1)).tolist()
        freed[0::2] = (size - _PLACEHOLDER_BYTES * batch * tokens for size in freed[0::2])
        for index, level in plan.weights:
            freed[index] -= facts.block_param_bytes[index] - facts.weight_levels(index)[level]
        native = self.memory.kv_bytes_by_layer(batch, tokens).tolist()
        for layer, cache in plan.caches:
            freed[2 * layer] -= native[layer] - self._cache_bytes(cache, layer, shape)
        return tuple(freed)

    def least_raise_bytes(self, plan: Plan, shape: BatchShape) -> int:
        """Fewest bytes with which some removed block returns or some item gets a better level."""
        facts, freed = self.memory.facts, self.freed_bytes(shape)
        steps = [freed[index] for index in plan.removed]
        for index, level in plan.weights:
            sizes = facts.weight_levels(index)
            steps.append(min(size - sizes[level] for size in sizes.values() if size > sizes[level]))
        for layer, cache in plan.caches:
            better = CacheLevel(min(16, 2 * cache.bits), cache.window_tokens)
            better = CacheLevel() if better == cache else better
            steps.append(
                self._cache_bytes(better, layer, shape) - self._cache_bytes(cache, layer, shape)
            )
        if plan.embeddings != "native":
            steps.append(facts.base_bytes - facts.embedding_levels[plan.embeddings])
        return max(1, min(steps, default=1))

    def _growth_bytes(self, plan: Plan, shape: BatchShape, tokens: int) -> int:
        """Bytes of keys and values that stay after `tokens` more tokens."""
        facts, lowered = self.memory.facts, dict(plan.caches)
        native = sum(
            size
            for layer, size in enumerate(facts.kv_bytes_per_token)
            if 2 * layer not in plan.removed and layer not in lowered
        )
        groups = tokens // GROUP_TOKENS + shape.rows  # each row may complete one more
        return tokens * native + groups * sum(
            level.group_bytes(facts.kv_heads[n], facts.kv_head_size[n], facts.itemsize)
            for n, level in plan.caches
        )

    def _window_bytes(self, plan: Plan, shape: BatchShape) -> int:
        """Bytes of a row's caches with windows: while a chunk may be interrupted, old ones stay."""
        sizes = self._cache_sizes(plan, BatchShape(1, shape.at_least_one[1]))
        own = enumerate(self.memory.facts.kv_window_tokens)
        return sum(
            sizes[n] for n, window in own if window or plan.cache_level(n).window_tokens is not None
        )

    def _cache_bytes(self, level: CacheLevel, layer: int, shape: BatchShape) -> int:
        """Most bytes of a layer's cache while a batch of this shape grows and shrinks."""
        batch, tokens = shape.at_least_one
        memory, facts = self.memory, self.memory.facts
        size = memory.cache_bytes(level, layer, batch, tokens)
        more = max(1, shape.rows) - batch
        if level.native or not more:
            return size
        tail = level.row_bytes(1, facts.kv_heads[layer], facts.kv_head_size[layer], facts.itemsize)
        if level.window_tokens is None:
            return size + more * tail
        full = (SINK_GROUPS + 1) * GROUP_TOKENS + level.window_tokens
        longer = memory.cache_bytes(level, layer, batch + more, max(tokens, full))
        if level.bits == 16:
            whole = batch * (tail + tokens * facts.kv_bytes_per_token[layer])
        else:
            whole = memory.cache_bytes(CacheLevel(level.bits), layer, batch, tokens)
        return min(longer, whole + more * tail)

    def _compute_cache_sizes(self, plan: Plan, shape: BatchShape) -> tuple[int, ...]:
        """Bytes of each layer's cache, (L,); those of removed blocks, which have none, if kept."""
        layers = range(self.memory.facts.num_layers)
        return tuple(self._cache_bytes(plan.cache_level(n), n, shape) for n in layers)

    def _kept_caches(self, plan: Plan, shape: BatchShape) -> list[int]:
        sizes = enumerate(self._cache_sizes(plan, shape))
        return [size for layer, size in sizes if 2 * layer not in plan.removed]

    def _compute_peak(self, plan: Plan, shape: BatchShape) -> int:
        request, caches = shape.request(1), self._kept_caches(plan, shape)
        parts = self.memory.breakdown(plan, request)
        peak = parts.peak + sum(caches) - parts.kv_cache
        tokens = request.batch_size * request.seq_len_tokens
        peak += _PLACEHOLDER_BYTES * tokens * plan.count_removed("attn")
        return peak + shape.kept_bytes + (max(caches, default=0) if shape else 0)
