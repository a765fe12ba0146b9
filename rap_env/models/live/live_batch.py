"""A batch of sequences with their KV caches; sequences join and leave, and the plan may change.

Shapes: B sequences (rows), T tokens cached for each, V entries of the head. Shorter rows are
padded on the left; attention masks hide the padding. Rows whose caches have the same levels are a
part (`RowPart`), and are padded to the longest row of the part alone.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rap_env.errors import InvalidRequestError
from rap_env.levels import CacheLevel
from rap_env.memory import PREFILL_CHUNK_TOKENS
from rap_env.models.caches.cache_blocks import CacheBlock, CachedRow, fill
from rap_env.models.caches.kv_cache import (
    BatchCache,
    PartedCache,
    PassInterruptedError,
    Past,
    append_rows,
    cache_argument,
    cache_bytes,
    levels_of,
    missing,
    note_rows,
    refill,
    reserve,
    select_rows,
    update_cache,
)
from rap_env.models.device import send
from rap_env.models.live.elastic import ElasticLLM
from rap_env.plan import Plan


@dataclass
class RowPart:
    """Rows whose caches have the same levels.

    Attributes:
        rows: Their tokens.
        cache: Their cache; None if it has to be computed.
    """

    rows: list[list[int]]
    cache: Any = None

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [len(row) for row in self.rows]

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths, default=0)

    def plan(self, plan: Plan, *, lowest: bool = False) -> Plan:
        """A plan with the levels that the cache has, or with the lowest of both that stay.

        Attention blocks that the cache lacks are removed.
        """
        if self.cache is None:
            return plan
        levels = levels_of(self.cache, lasting=lowest)
        return _at_levels(plan, levels, missing(self.cache), lowest)

    def select(self, rows: Sequence[int], device: torch.device) -> None:
        """Keep some rows, in this order, and free the memory of the others and common padding."""
        if list(rows) == list(range(len(self.rows))):
            return
        before, cache = self.length, self.cache
        self.rows, self.cache = [self.rows[row] for row in rows], None
        if cache is None:
            return
        index = send(torch.tensor(rows), device)
        for layer in cache.layers:
            select_rows(layer, self.length, index, before - self.length)
        self.cache = cache
        note_rows(cache, self.lengths)


def merged(parts: Sequence[RowPart], new: int = 0) -> list[RowPart]:
    """Parts in which neighbours with caches at equal levels, of the same layers, are one.

    Those that copies can raise and those that they cannot stay apart.

    Args:
        parts: Parts with caches; they must not be used afterwards.
        new: Last tokens of each row that are not cached yet.
    """
    neighbours: list[RowPart] = []
    for _, group in itertools.groupby(parts, key=_kind):
        first, *others = group
        for part in others:
            length = max(first.length, part.length) - new
            for mine, theirs in zip(first.cache.layers, part.cache.layers, strict=True):
                append_rows(mine, theirs, length)
            first.rows = first.rows + part.rows
            note_rows(first.cache, [length - new for length in first.lengths])
        neighbours.append(first)
    return neighbours


def _kind(part: RowPart) -> tuple[Any, ...]:
    cache = part.cache
    return levels_of(cache), levels_of(cache, lasting=True), missing(cache)


def columns_of(rows: Sequence[Sequence[int]], first: int, end: int, device: torch.device) -> Past:
    """Columns of the matrix of rows, padded on the left; the mask starts at column 0."""
    length = max(map(len, rows))
    pads = [length - len(row) for row in rows]
    lines = [
        [pad, *[0] * (min(end, pad) - first), *row[max(0, first - pad) : max(0, end - pad)]]
        for pad, row in zip(pads, rows, strict=True)
    ]
    sent = send(torch.tensor(lines), device)  # all in one tensor
    positions = torch.arange(end, device=device) - sent[:, :1]
    return Past(sent[:, 1:], (positions >= 0).long(), positions[:, first:].clamp(min=0))


_Levels = tuple[tuple[int, CacheLevel], ...]


@functools.lru_cache(maxsize=64)
def _at_levels(plan: Plan, levels: _Levels, absent: frozenset[int], lowest: bool) -> Plan:
    own = {n: level.lowest(plan.cache_level(n)) if lowest else level for n, level in levels}
    caches = tuple(sorted({**dict(plan.caches), **own}.items()))
    return replace(plan, caches=caches, removed=plan.removed | {2 * layer for layer in absent})


class LiveBatch:
    """A batch of sequences with their KV caches on a live model.

    It runs under the model's plan: `ElasticLLM.apply` may change the plan between any two
    calls, from any thread. The keys and values of a removed attention block are evicted
    immediately; rows go on without a block that is restored, and with caches below the plan's
    levels unless there are copies (see `models.caches.kv_cache`). Rows whose caches have
    different levels are in parts, each with a cache of its own; one pass runs them all (see
    `caches.kv_cache.PartedCache`), and another one those that lack other attention blocks. Each
    call holds the model exclusively; all calls of one batch must come from one thread. After
    a call that failed the rows are unchanged, and the next call computes their cache again.

    Args:
        llm: The live model.
        most_tokens: Most tokens, of all rows together, to run at once in a prefill; fewer
            need less workspace.
        interrupt: Called before each layer of a pass, but not of a refill. If it returns
            True, the pass ends there with a `PassInterruptedError`, and rows and caches are
            unchanged.
        copies: A folder for files with copies of what is lowered, from which caches get
            better levels at once when the plan has them; None for no copies.

    Attributes:
        reserve_tokens: Tokens of a row for which native caches get room when they are
            allocated, so that they need not be copied until then. What is reserved counts in
            `kv_bytes`.
    """

    def __init__(
        self,
        llm: ElasticLLM,
        *,
        most_tokens: int = PREFILL_CHUNK_TOKENS,
        interrupt: Callable[[], bool] | None = None,
        copies: Path | None = None,
    ) -> None:
        self._copies = copies
        self._llm = llm
        self._most_tokens = most_tokens
        self._interrupt = interrupt
        self._argument = cache_argument(llm.model)
        self._reserve_tokens = 0
        self._parts: list[RowPart] = []

    @property
    def reserve_tokens(self) -> int:
        """Tokens of a row for which native caches get room when they are allocated, see above."""
        return self._reserve_tokens

    @reserve_tokens.setter
    def reserve_tokens(self, tokens: int) -> None:
        self._reserve_tokens = tokens
        for part in self._parts:
            if part.cache is not None:
                reserve(part.cache, tokens)

    @property
    def _rows(self) -> list[list[int]]:
        return [row for part in self._parts for row in part.rows]

    @property
    def size(self) -> int:
        """B, the number of rows."""
        return sum(len(part.rows) for part in self._parts)

    @property
    def length(self) -> int:
        """T, tokens cached for each row, padding included; 0 without rows."""
        return max((part.length for part in self._parts), default=0)

    @property
    def kv_bytes(self) -> int:
        """Bytes that the KV caches take."""
        return sum(cache_bytes(part.cache) for part in self._parts if part.cache is not None)

    @property
    def plans(self) -> list[Plan]:
        """For each row the model's plan with the levels that the row's cache has, (B,)."""
        plan = self._llm.plan
        return [own for part in self._parts for own in [part.plan(plan)] * len(part.rows)]

    @property
    def lowest_plan(self) -> Plan:
        """The model's plan with the lowest level that a row has of each cache."""
        plan = self._llm.plan
        for part in self._parts:
            plan = part.plan(plan, lowest=True)
        return plan

    def row_bytes(self, row: int) -> int:
        """Bytes of one row's cache: its share of those of rows with the same levels."""
        part = self._parts[self._part_of(row)[0]]
        return 0 if part.cache is None else cache_bytes(part.cache) // len(part.rows)

    def _part_of(self, row: int) -> tuple[int, int]:
        """The number of the part that a row is in, and its number there."""
        for number, part in enumerate(self._parts):
            if row < len(part.rows):
                return number, row
            row -= len(part.rows)
        raise IndexError(row)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Fill an empty batch with one row per prompt.

        Returns:
            Logits after the last token of each row, (B, V), float32.

        Raises:
            InvalidRequestError: There are rows already, or a prompt is empty.
        """
        if self._parts:
            raise InvalidRequestError(
                f"The batch has {self.size} rows already; empty it with keep([]) before a prefill."
            )
        rows = [list(map(int, prompt)) for prompt in prompts]
        if not rows or not all(rows):
            raise InvalidRequestError("A batch needs prompts of at least one token each.")
        length = max(map(len, rows))
        width = max(1, self._most_tokens // len(rows))
        logits = torch.empty(0)
        part = RowPart([])
        self._parts = [part]
        try:
            for end in [*range(width, length, width), length]:
                # All rows end together: the first chunks of short rows are padding.
                cached = part.length
                part.rows = [row[: max(0, len(row) - (length - end))] for row in rows]
                logits = self._forward(end - cached)
        except BaseException:
            self._parts = []
            raise
        return logits

    def extend(self, tokens: Sequence[int]) -> torch.Tensor:
        """Run one decoding step: append a token to each row.

        Returns:
            Logits after the token, (B, V), float32.

        Raises:
            InvalidRequestError: There are not as many tokens as rows.
        """
        return self.append([[token] for token in tokens])

    def append(self, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """Append several tokens to each row, the same number to all; otherwise as `extend`."""
        counts = {len(new) for new in tokens}
        if len(tokens) != self.size or len(counts) != 1 or 0 in counts:
            raise InvalidRequestError(
                f"{self.size} rows need {self.size} lists of tokens of one length of at least 1, "
                f"not {len(tokens)} lists of lengths {sorted(counts)}."
            )
        count = counts.pop()
        for row, new in zip(self._rows, tokens, strict=True):
            row.extend(map(int, new))
        try:
            return self._forward(count)
        except BaseException as error:
            for row in self._rows:
                del row[-count:]
            for part in self._parts:
                if isinstance(error, PassInterruptedError):
                    note_rows(part.cache, part.lengths)
                else:
                    part.cache = None
            raise

    def keep(self, rows: Sequence[int]) -> None:
        """Keep some rows, in this order; free the memory of the others and common padding.

        Rows of unequal levels stay in the order in which their parts joined.

        Args:
            rows: Indices of rows; an empty list empties the batch.
        """
        if list(rows) == list(range(self.size)):
            return
        with self._llm.exclusive(), torch.inference_mode():
            kept, first = [], 0
            for part in self._parts:
                end = first + len(part.rows)
                own = [row - first for row in rows if first <= row < end]
                first = end
                if own:
                    part.select(own, self._llm.device)
                    kept.append(part)
            self._parts = kept

    def cached_row(self, row: int) -> CachedRow | None:
        """A row and its cache, to cut blocks from until the next call; None without a cache."""
        number, row = self._part_of(row)
        part = self._parts[number]
        if part.cache is None:
            return None
        return CachedRow(tuple(part.rows[row]), part.cache, row, part.length)

    def fill(self, tokens: Sequence[int], blocks: Sequence[CacheBlock]) -> None:
        """Fill an empty batch with a row whose cache is put together from blocks.

        Layers have the plan's levels at once, except those of which blocks have less.

        Args:
            tokens: The row.
            blocks: Blocks of a sequence that begins with these tokens.

        Raises:
            OSError: A block is in a file that cannot be read; the batch stays empty.
        """
        with self._llm.exclusive(), torch.inference_mode():
            cache, plan = self._new_cache(), self._llm.plan
            removed = self._llm.removed_attention
            fill(cache, blocks, len(tokens), dict(plan.caches), removed, self._reserve_tokens)
            self._parts = [RowPart([list(tokens)], cache)]
            note_rows(cache, [len(tokens)])

    def join(self, other: LiveBatch) -> None:
        """Append the rows of another batch, which is empty afterwards.

        All caches are updated to the model's plan first. Rows whose caches have the same
        levels and lack the same layers as those of the last ones here share a cache with
        them.

        Raises:
            InvalidRequestError: The other batch uses another model.
        """
        if other._llm is not self._llm:
            raise InvalidRequestError("Only batches of the same model can be joined.")
        if not other._parts:
            return
        with self._llm.exclusive(), torch.inference_mode():
            parts = [*self._parts, *other._parts]
            if self._parts:
                try:
                    self._update(parts)
                    parts = merged(parts)
                except BaseException:
                    for part in parts:
                        part.cache = None  # some layers may be joined, others not
                    raise
            self._parts, other._parts = parts, []
            self.reserve_tokens = self._reserve_tokens  # the layers had the other batch's

    def close(self) -> None:
        """Remove all rows."""
        self.keep([])

    def _update(self, parts: Sequence[RowPart], new: int = 0) -> None:
        """Bring the caches of parts to the model's plan, and tokens before `new` ones into them."""
        for part in parts:
            if part.cache is None:
                part.cache = self._new_cache()
                if part.length > new:
                    past = columns_of(part.rows, 0, part.length - new, self._llm.device)
                    refill(self._llm, part.cache, past, self._most_tokens)
            update_cache(self._llm, part.cache)

    def _forward(self, new: int) -> torch.Tensor:
        """Run the last `new` tokens of each row, and return the logits after them, (B, V)."""
        with torch.inference_mode():
            logits = self._last_logits(new)
        # A copy outside of that mode, which callers may change in place.
        return logits.to(torch.float32, copy=True)

    def _last_logits(self, new: int) -> torch.Tensor:
        with self._llm.exclusive():
            self._update(self._parts, new)
            if len(self._parts) > 1:
                self._parts = merged(self._parts, new)
            groups = itertools.groupby(self._parts, key=lambda part: missing(part.cache))
            with ExitStack() as interruptible:
                if self._interrupt is not None:
                    for part in self._parts:
                        interruptible.enter_context(part.cache.interruptible(self._interrupt))
                logits = [self._pass(list(parts), absent, new) for absent, parts in groups]
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    def _pass(self, parts: Sequence[RowPart], absent: frozenset[int], new: int) -> torch.Tensor:
        """Run the rows of parts whose caches lack the layers `absent`; logits, (B, V)."""
        rows = [row for part in parts for row in part.rows]
        length = max(map(len, rows))
        columns = columns_of(rows, length - new, length, self._llm.device)
        padded = min(map(len, rows)) < length
        for part in parts:
            note_rows(part.cache, part.lengths)  # so that nothing has to read the mask
        cache = parts[0].cache
        if len(parts) > 1:
            lengths = [part.lengths for part in parts]
            cache = PartedCache([part.cache for part in parts], lengths, new)
            note_rows(cache, [len(row) for row in rows])
        with self._llm.without({2 * number for number in absent}):
            output = self._llm.model(
                input_ids=columns.tokens,
                attention_mask=columns.attention_mask if padded else None,
                position_ids=columns.position_ids,
                use_cache=True,
                logits_to_keep=1,
                **{self._argument: cache},
            )
        last: torch.Tensor = output.logits[:, -1]
        return last

    def _new_cache(self) -> Any:
        cache = BatchCache(self._llm.model.config, self._copies, self._reserve_tokens)
        self._llm.track_cache(cache)
        return cache
