"""Byte arithmetic: what a plan needs for a request. It loads neither torch nor a model.

Weights and KV cache are exact at every level: equal to the bytes of the tensors that the
model and its cache hold, with scales, zeros and the unquantised tail of a cache. The
workspace (activations of one prefill chunk, logits of one position, the buffer into which
packed weights are widened, the pieces of attention over lowered caches) is an estimate and is
called one.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from rap_env.errors import InfeasibleBudgetError, InvalidRequestError
from rap_env.levels import ATTENTION_WORKSPACE_BYTES, CacheLevel
from rap_env.model_facts import HasFacts, ModelFacts
from rap_env.plan import Plan, check_levels
from rap_env.request import Request, human_bytes

PREFILL_CHUNK_TOKENS = 2048
"""Prompt tokens processed in one pass; servers limit it, so the workspace is bounded."""

_LOGIT_BYTES = 4  # logits are float32
MAX_BATCH_SIZE = 2**20
"""Largest batch size that is accepted; it keeps the arithmetic within 64 bits."""

_NO_WINDOW = 2**62  # tokens
_CACHED_PLANS = 256  # about a kilobyte each
_NATIVE = Plan()


@dataclass(frozen=True)
class MemoryBreakdown:
    """Bytes of one plan under one request, by what they hold."""

    attn_weights: int
    ffn_weights: int
    embeddings: int
    kv_cache: int
    workspace: int

    @property
    def weights(self) -> int:
        """Bytes of the kept blocks."""
        return self.attn_weights + self.ffn_weights

    @property
    def peak(self) -> int:
        """Sum of all parts: the peak bytes."""
        return self.weights + self.embeddings + self.kv_cache + self.workspace

    def as_dict(self) -> dict[str, int]:
        """Bytes by name, for records."""
        return {
            "weights_bytes": self.weights,
            "embeddings_bytes": self.embeddings,
            "kv_cache_bytes": self.kv_cache,
            "workspace_bytes": self.workspace,
        }


class MemoryModel:
    """Byte arithmetic of one model.

    Args:
        model: A live model (anything with `facts`) or the facts themselves.
        chunk_tokens: Prompt tokens processed in one pass.
    """

    def __init__(
        self, model: HasFacts | ModelFacts, chunk_tokens: int = PREFILL_CHUNK_TOKENS
    ) -> None:
        self.facts = facts = model if isinstance(model, ModelFacts) else model.facts
        self._chunk_tokens = chunk_tokens
        windows = [_NO_WINDOW if w is None else w for w in facts.kv_window_tokens]
        self._block_bytes = np.array(facts.block_param_bytes, dtype=np.int64)  # (2L,)
        self._kv_bytes_per_token = np.array(facts.kv_bytes_per_token, dtype=np.int64)  # (L,)
        self._windows = np.array(windows, dtype=np.int64)  # (L,)
        widths = map(operator.mul, facts.kv_heads, facts.kv_head_size)
        self._widest_cache = max(widths, default=0)  # keys of a token

    def check(self, batch_size: int, seq_len_tokens: int) -> None:
        """Reject a batch size or a length that the model cannot serve.

        Raises:
            InvalidRequestError: The batch size is not between 1 and `MAX_BATCH_SIZE`, or the
                length is not between 1 and the model's positions.
        """
        if not 1 <= batch_size <= MAX_BATCH_SIZE:
            raise InvalidRequestError(
                f"The batch size must be from 1 to {MAX_BATCH_SIZE}, not {batch_size}."
            )
        longest = self.facts.max_positions
        if not 1 <= seq_len_tokens <= longest:
            raise InvalidRequestError(
                f"The sequence length must be from 1 to {longest} tokens (the positions of "
                f"{self.facts.name}), not {seq_len_tokens}."
            )

    def kv_bytes_by_layer(self, batch_size: int, seq_len_tokens: int) -> npt.NDArray[np.int64]:
        """Bytes of each layer's cache after `seq_len_tokens` tokens a sequence, shape (L,)."""
        return batch_size * np.minimum(seq_len_tokens, self._windows) * self._kv_bytes_per_token

    def freed_bytes(self, request: Request) -> npt.NDArray[np.int64]:
        """Weight and cache bytes that each block's removal frees, shape (2L,)."""
        freed = self._block_bytes.copy()
        freed[0::2] += self.kv_bytes_by_layer(request.batch_size, request.seq_len_tokens)
        return freed

    def cache_shape(self, layer: int) -> tuple[int | None, ...]:
        """What the bytes of a layer's cache depend on: layers of equal shapes need equal bytes."""
        facts = self.facts
        levels = (facts.kv_heads[layer], facts.kv_head_size[layer]) if facts.kv_heads else ()
        return (facts.kv_bytes_per_token[layer], facts.kv_window_tokens[layer], *levels)

    def cache_bytes(
        self, level: CacheLevel, layer: int, batch_size: int, seq_len_tokens: int
    ) -> int:
        """Bytes of a layer's cache at a level after `seq_len_tokens` tokens a sequence."""
        facts, window = self.facts, self.facts.kv_window_tokens[layer]
        if level.native:
            tokens = seq_len_tokens if window is None else min(seq_len_tokens, window)
            return batch_size * tokens * facts.kv_bytes_per_token[layer]
        heads, size = facts.kv_heads[layer], facts.kv_head_size[layer]
        return batch_size * level.row_bytes(seq_len_tokens, heads, size, facts.itemsize, window)

    def cache_terms(self, level: CacheLevel, layer: int) -> tuple[int, int, int, bool]:
        """What the bytes of one sequence's cache at a level are made of.

        Returns:
            Bytes whatever the length; the most units of the length that count; bytes of each;
            whether a unit is a token, not a group before the last one.
        """
        facts, window = self.facts, self.facts.kv_window_tokens[layer]
        if level.native:
            return 0, window or _NO_WINDOW, facts.kv_bytes_per_token[layer], True
        shape = facts.kv_heads[layer], facts.kv_head_size[layer], facts.itemsize
        most = level.groups_held(_NO_WINDOW, window)
        return level.row_bytes(1, *shape, window), most, level.group_bytes(*shape), False

    def check_plan(self, plan: Plan) -> Plan:
        """Return a plan if the model has all its items and levels.

        Raises:
            UnknownNameError: It names an item or a level that the model does not have.
        """
        plan = plan.check(self.facts.num_blocks)
        for index, level in plan.weights:
            if level not in (known := self.facts.weight_levels(index)):
                check_levels(plan, [name for name in known if name != "native"])
        if plan.embeddings not in (known := self.facts.embedding_levels):
            check_levels(plan, known)
        return plan

    def breakdown(self, plan: Plan, request: Request) -> MemoryBreakdown:
        """The bytes that the model with a plan holds while it serves `request`.

        Raises:
            InvalidRequestError: As for `check`.
            UnknownNameError: The plan names items or levels that the model does not have.
        """
        batch_size, seq_len_tokens = request.batch_size, request.seq_len_tokens
        self.check(batch_size, seq_len_tokens)
        of_plan = _bytes_of_plan(self, plan)
        workspace = of_plan.workspace + self.workspaces(batch_size, seq_len_tokens, of_plan.any_ffn)
        if of_plan.lowered_caches:
            workspace += self.attention_workspace_bytes(request)
        return MemoryBreakdown(
            attn_weights=of_plan.attn_weights,
            ffn_weights=of_plan.ffn_weights,
            embeddings=of_plan.embeddings,
            kv_cache=sum(
                layers * self.cache_bytes(level, layer, batch_size, seq_len_tokens)
                for level, layer, layers in of_plan.caches
            ),
            workspace=workspace,
        )

    def peak_bytes(self, plan: Plan, request: Request) -> int:
        """Kept weights + embeddings and head + KV cache of kept attn blocks + workspace."""
        return self.breakdown(plan, request).peak

    def first_that_fits(self, plans: Iterable[Plan], request: Request) -> Plan:
        """The first of some plans that fits a request, or the last one if none does."""
        for plan in plans:
            if self.peak_bytes(plan, request) <= request.budget_bytes:
                break
        return plan

    def native_peak_bytes(self, batch_size: int, seq_len_tokens: int) -> int:
        """Peak bytes of the unpruned model.

        Raises:
            InvalidRequestError: As for `check`.
        """
        return self.peak_bytes(_NATIVE, Request(batch_size, seq_len_tokens, budget_bytes=1))

    def peak_bytes_without_blocks(self, request: Request) -> int:
        """Peak bytes with every block removed: no mask needs less."""
        return self.peak_bytes(Plan.removing(*range(self.facts.num_blocks)), request)

    def check_fits(self, plan: Plan, request: Request) -> None:
        """Raise an `InfeasibleBudgetError` unless a plan fits a request's budget."""
        if (need := self.peak_bytes(plan, request)) > request.budget_bytes:
            least = min(need, self.peak_bytes_without_blocks(request))
            what = "This plan"
            rest = f"give more (without any block the model needs {human_bytes(least)})"
            if least > request.budget_bytes:
                shape = f"{request.batch_size} x {request.seq_len_tokens} tokens"
                need, what, rest = least, f"For {shape}, the smallest plan", "give more"
            raise InfeasibleBudgetError(
                f"{what} needs {human_bytes(need)}, {human_bytes(need - request.budget_bytes)} "
                f"more than the budget of {human_bytes(request.budget_bytes)}; {rest}."
            )

    def workspace_bytes(self, request: Request) -> int:
        """Estimate: activations of one prefill chunk and one position's float32 logits."""
        return int(self.workspaces(request.batch_size, request.seq_len_tokens))

    def attention_workspace_bytes(self, request: Request) -> int:
        """Estimate: the pieces of one layer in which attention over lowered caches runs."""
        return int(self.attention_workspaces(request.batch_size, request.seq_len_tokens))

    def attention_workspaces(self, batch_sizes: Any, seq_lens_tokens: Any) -> Any:
        """`attention_workspace_bytes` of a shape, or of many, (n,) each."""
        tokens = batch_sizes * seq_lens_tokens
        return _least(16 * tokens * self._widest_cache, ATTENTION_WORKSPACE_BYTES)

    def workspaces(self, batch_sizes: Any, seq_lens_tokens: Any, any_ffn: bool = True) -> Any:
        """`workspace_bytes` of a shape, or of many, (n,) each."""
        facts = self.facts
        tokens = _least(batch_sizes * seq_lens_tokens, self._chunk_tokens)
        inner = max(4 * facts.hidden_size, 2 * facts.ffn_width if any_ffn else 0)
        activations = tokens * facts.itemsize * (3 * facts.hidden_size + inner)
        activations += facts.widen_bytes if facts.packed else 0
        return activations + batch_sizes * facts.vocab_size * _LOGIT_BYTES


def _least(count: Any, most: int) -> Any:
    """A number, or each number of an array, but at most `most`."""
    return np.minimum(count, most) if isinstance(count, np.ndarray) else min(count, most)


@dataclass(frozen=True)
class _PlanBytes:
    """What a plan holds whatever it serves, and the caches that it keeps.

    Attributes:
        workspace: Bytes of the workspace that do not depend on the request.
        any_ffn: Whether an FFN block is kept.
        lowered_caches: Whether the plan lowers a cache.
        caches: Kept caches as level, a layer, and the number of layers that need equal bytes.
    """

    attn_weights: int
    ffn_weights: int
    embeddings: int
    workspace: int
    any_ffn: bool
    lowered_caches: bool
    caches: tuple[tuple[CacheLevel, int, int], ...]


@lru_cache(maxsize=_CACHED_PLANS)
def _bytes_of_plan(memory: MemoryModel, plan: Plan) -> _PlanBytes:
    """What a plan holds; the most recent ones are cached, since workloads ask for one plan only.

    Raises:
        UnknownNameError: The plan names items or levels that the model does not have.
    """
    facts, plan = memory.facts, memory.check_plan(plan)
    removed = plan.removed
    params = list(facts.block_param_bytes)
    for index, level in plan.weights:
        params[index] = facts.weight_levels(index)[level]
    kept = [index for index in range(facts.num_blocks) if index not in removed]
    caches: dict[Any, tuple[CacheLevel, int, int]] = {}
    for layer in (index // 2 for index in kept if index % 2 == 0):
        cache = plan.cache_level(layer)
        key = cache, memory.cache_shape(layer)
        _, first, layers = caches.get(key, (cache, layer, 0))
        caches[key] = cache, first, layers + 1
    lowered = plan.weights or plan.embeddings != "native"
    return _PlanBytes(
        attn_weights=sum(params[index] for index in kept if index % 2 == 0),
        ffn_weights=sum(params[index] for index in kept if index % 2),
        embeddings=facts.embedding_levels[plan.embeddings],
        workspace=facts.widen_bytes if lowered and not facts.packed else 0,
        any_ffn=any(index % 2 for index in kept),
        lowered_caches=bool(plan.caches),
        caches=tuple(caches.values()),
    )
