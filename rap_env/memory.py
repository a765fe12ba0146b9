"""Byte arithmetic: what a plan needs for a request. It loads neither torch nor a model.

Weights and KV cache are exact at every level: equal to the bytes of the tensors that the
model and its cache hold, with scales, zeros and the unquantised tail of a cache. The
workspace (activations of one prefill chunk, logits of one position, the buffer into which
packed weights are widened, the pieces of attention over lowered caches) is an estimate and is
called one.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from rap_env.artifacts import with_tuples
from rap_env.errors import InfeasibleBudgetError, InvalidRequestError
from rap_env.levels import ATTENTION_WORKSPACE_BYTES, WEIGHT_LEVELS, CacheLevel, WeightLevel
from rap_env.plan import Plan, block_name, check_levels
from rap_env.request import Request, human_bytes


@dataclass(frozen=True)
class ModelFacts:
    """The properties of a model that the arithmetic needs (L layers, 2L blocks).

    Attributes:
        name: The user's name for the model.
        fingerprint: SHA-256 over the weights and the config, in hex.
        dtype: Name of the weights' dtype, such as ``"bfloat16"``.
        block_param_bytes: Bytes of each block's own tensors, shape (2L,).
        base_bytes: Bytes of everything else (embeddings, head, last norm), tied tensors once.
        kv_bytes_per_token: Bytes that one token of one sequence adds to each layer's cache,
            (L,).
        kv_window_tokens: Most tokens that each layer's cache holds (sliding window), or None,
            (L,).
        itemsize: Bytes of one activation value.
        hidden_size: Width of the residual stream.
        ffn_width: Widest hidden activation of a feed-forward block for one token.
        vocab_size: Number of entries of the head.
        max_positions: Longest sequence the model accepts, in tokens.
        weights: The format of native weights: ``"unquantised"``, or what packed ones came
            from, such as ``"packed"``.
        level_param_bytes: For each packed level the bytes of each block, (2L,); 0 where a
            block has no such level below its native one. A level that no block has may be
            absent.
        level_base_bytes: As `base_bytes` at each packed level that embeddings and head have.
        widen_bytes: Bytes of the buffer into which packed weights are widened, one matrix at
            a time.
        calibration: Hash of the text with which weights of few bits are made, in hex; empty
            without one.
        kv_heads: Key and value heads of each layer, (L,); empty if caches have no levels.
        kv_head_size: Channels of a key or value head of each layer, (L,).
    """

    name: str
    fingerprint: str
    dtype: str
    block_param_bytes: tuple[int, ...]
    base_bytes: int
    kv_bytes_per_token: tuple[int, ...]
    kv_window_tokens: tuple[int | None, ...]
    itemsize: int
    hidden_size: int
    ffn_width: int
    vocab_size: int
    max_positions: int
    weights: str = "unquantised"
    level_param_bytes: Mapping[WeightLevel, tuple[int, ...]] = field(default_factory=dict)
    level_base_bytes: Mapping[WeightLevel, int] = field(default_factory=dict)
    widen_bytes: int = 0
    kv_heads: tuple[int, ...] = ()
    kv_head_size: tuple[int, ...] = ()
    calibration: str = ""

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ModelFacts:
        """Facts from the JSON form of their fields, whose tuples are lists; no other is read."""
        own = {entry.name: values[entry.name] for entry in fields(cls) if entry.name in values}
        blocks = own.get("level_param_bytes", {})
        return cls(**{**with_tuples(own), "level_param_bytes": with_tuples(blocks)})

    @property
    def identity(self) -> dict[str, str]:
        """Identity of the model in scores: weights, their dtype and the calibration of levels."""
        own = {"model": self.fingerprint, "dtype": self.dtype}
        if self.weights != "unquantised":
            own["weights"] = self.weights
        if self.calibration:
            own["calibration"] = self.calibration
        return own

    @property
    def packed(self) -> bool:
        """Whether native weights are packed."""
        return self.weights != "unquantised"

    def weight_levels(self, index: int) -> dict[WeightLevel, int]:
        """The levels of a block's weights that exist, from native down, with their bytes."""
        sizes = {level: blocks[index] for level, blocks in self.level_param_bytes.items()}
        sizes["native"] = self.block_param_bytes[index]
        levels = {level: sizes[level] for level in WEIGHT_LEVELS if sizes.get(level)}
        return {**levels, "removed": 0}

    def without_levels(self, levels: Collection[str]) -> ModelFacts:
        """The same model without some packed levels."""
        blocks = {n: sizes for n, sizes in self.level_param_bytes.items() if n not in levels}
        others = {n: size for n, size in self.level_base_bytes.items() if n not in levels}
        return replace(self, level_param_bytes=blocks, level_base_bytes=others)

    def blocks_at(self, level: WeightLevel) -> dict[str, str]:
        """The level for each block that has it, by name: what `Plan.of` takes."""
        having = (i for i in range(self.num_blocks) if level in self.weight_levels(i))
        return {block_name(index): level for index in having}

    @property
    def embedding_levels(self) -> dict[WeightLevel, int]:
        """The levels of embeddings and head that exist, with the bytes outside all blocks."""
        sizes = {"native": self.base_bytes, **self.level_base_bytes}
        return {level: sizes[level] for level in WEIGHT_LEVELS if level in sizes}

    @property
    def num_layers(self) -> int:
        """L, the number of decoder layers."""
        return len(self.kv_bytes_per_token)

    @property
    def num_blocks(self) -> int:
        """2L: each layer has an attn and an ffn block."""
        return len(self.block_param_bytes)


class HasFacts(Protocol):
    """A live model that provides its facts, such as `rap_env.models.ElasticLLM`."""

    @property
    def facts(self) -> ModelFacts:
        """The properties that the arithmetic needs."""


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
            workspace += int(self.attention_workspaces(batch_size, seq_len_tokens))
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

    def attention_workspaces(self, batch_sizes: Any, seq_lens_tokens: Any) -> Any:
        """Estimate: the pieces of one layer in which attention over lowered caches runs, (n,)."""
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
