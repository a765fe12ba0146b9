"""A batch of sequences with one KV cache; sequences join and leave, and the mask may change.

Shapes: B sequences (rows), T tokens cached for each, V entries of the head. Shorter rows are padded
on the left; attention masks hide the padding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from rap_env.errors import InvalidRequestError, check_name
from rap_env.memory import PREFILL_CHUNK_TOKENS
from rap_env.models.caches.grouped_cache import GroupedLayer
from rap_env.models.caches.kv_cache import (
    RESTORES,
    Past,
    Restore,
    cache_argument,
    cache_bytes,
    evict,
    missing,
    refill,
    step,
    update_cache,
)
from rap_env.models.caches.layers import (
    ReservedLayer,
    lower,
    lowest_levels,
    note_rows,
    reserve,
    with_room,
)
from rap_env.models.device import send
from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.live.interruption import InterruptibleCache, PassInterruptedError


class LiveBatch:
    """A batch of sequences with one KV cache on a live model.

    It runs under the model's mask: `ElasticLLM.apply` may change the mask between any two calls,
    from any thread. The keys and values of a removed attention block are evicted immediately. A
    restored block is handled at the next call that runs the model or joins batches: its cache is
    refilled, or it stays unused until the batch is empty (see `models.caches.kv_cache`). Each call
    holds the model exclusively; all calls of one batch must come from one thread. After a call
    that failed the rows are unchanged, and the next call computes their cache again.

    Args:
        llm: The live model.
        restore: ``"refill"`` or ``"next_request"``.
        most_tokens: Most tokens, of all rows together, to run at once in a prefill or refill;
            fewer need less workspace.
        interrupt: Called before each layer of a pass, but not of a refill. If it returns True, the
            pass ends there with a `PassInterruptedError` and the rows are unchanged; if earlier
            tokens cannot stay in the cache, `kv_bytes` is 0 afterwards.

    Attributes:
        reserve_tokens: Tokens of a row for which native caches get room when they are allocated,
            so that they need not be copied until then. What is reserved counts in `kv_bytes`.
    """

    def __init__(
        self,
        llm: ElasticLLM,
        *,
        restore: Restore = "refill",
        most_tokens: int = PREFILL_CHUNK_TOKENS,
        interrupt: Callable[[], bool] | None = None,
    ) -> None:
        check_name("restore mode", restore, RESTORES)
        self._llm = llm
        self._restore = restore
        self._most_tokens = most_tokens
        self._interrupt = interrupt
        self._argument = cache_argument(llm.model)
        self._reserve_tokens = 0
        self._rows: list[list[int]] = []
        self._cache: Any = None

    @property
    def reserve_tokens(self) -> int:
        """Tokens of a row for which native caches get room when they are allocated, see above."""
        return self._reserve_tokens

    @reserve_tokens.setter
    def reserve_tokens(self, tokens: int) -> None:
        self._reserve_tokens = tokens
        if self._cache is not None:
            reserve(self._cache, tokens)

    @property
    def size(self) -> int:
        """B, the number of rows."""
        return len(self._rows)

    @property
    def length(self) -> int:
        """T, tokens cached for each row, padding included; 0 without rows."""
        return max(map(len, self._rows), default=0)

    @property
    def kv_bytes(self) -> int:
        """Bytes that the KV cache takes."""
        return 0 if self._cache is None else cache_bytes(self._cache)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Fill an empty batch with one row per prompt.

        Returns:
            Logits after the last token of each row, (B, V), float32.

        Raises:
            InvalidRequestError: There are rows already, or a prompt is empty.
        """
        if self._rows:
            raise InvalidRequestError(
                f"The batch has {self.size} rows already; empty it with keep([]) before a prefill."
            )
        rows = [list(map(int, prompt)) for prompt in prompts]
        if not rows or not all(rows):
            raise InvalidRequestError("A batch needs prompts of at least one token each.")
        length = max(map(len, rows))
        width = max(1, self._most_tokens // len(rows))
        logits = torch.empty(0)
        try:
            for end in [*range(width, length, width), length]:
                # All rows end together: the first chunks of short rows are padding.
                cached = self.length
                self._rows = [row[: max(0, len(row) - (length - end))] for row in rows]
                logits = self._forward(end - cached)
        except BaseException:
            self._rows, self._cache = [], None
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
            if isinstance(error, PassInterruptedError) and self._cache is not None:
                note_rows(self._cache, self._lengths)
            else:
                self._cache = None
            raise

    def keep(self, rows: Sequence[int]) -> None:
        """Keep some rows, in this order; free the memory of the others and common padding.

        Args:
            rows: Indices of rows; an empty list empties the batch.
        """
        if list(rows) == list(range(self.size)):
            return
        with self._llm.exclusive(), torch.inference_mode():
            before, cache = self.length, self._cache
            self._rows, self._cache = [self._rows[row] for row in rows], None
            if not self._rows or cache is None:
                return
            index = {device: send(torch.tensor(rows), device) for device in self._llm.devices}
            cut = before - self.length
            for layer in cache.layers:
                _select(layer, self.length, index, cut)
            self._cache = cache
            note_rows(cache, self._lengths)

    def join(self, other: LiveBatch) -> None:
        """Append the rows of another batch, which is empty afterwards.

        Both caches are updated to the model's mask first. Layers that are missing in one of them
        are missing in the result.

        Raises:
            InvalidRequestError: The other batch uses another model.
        """
        if other._llm._live is not self._llm._live:
            raise InvalidRequestError("Only batches of the same model can be joined.")
        if not other._rows:
            return
        with self._llm.exclusive(), torch.inference_mode():
            if not self._rows:
                self._rows, self._cache = other._rows, other._cache
                self.reserve_tokens = self._reserve_tokens  # the layers had the other batch's
            else:
                self._append_rows(other)
            other._rows, other._cache = [], None

    def close(self) -> None:
        """Remove all rows."""
        self.keep([])

    def _append_rows(self, other: LiveBatch) -> None:
        try:
            for batch in (self, other):
                batch._update()
            absent = missing(self._cache) | missing(other._cache)
            for batch in (self, other):
                evict(batch._cache, absent)
            for batch in (self, other):
                lower(batch._cache, lowest_levels(self._cache, other._cache), batch._lengths)
            rows = self._rows + other._rows
            length = max(map(len, rows))
            for mine, theirs in zip(self._cache.layers, other._cache.layers, strict=True):
                _concatenate(mine, theirs, length)
        except BaseException:
            self._cache = other._cache = None  # some layers may be joined, others not
            raise
        self._rows = rows
        note_rows(self._cache, self._lengths)

    @property
    def _lengths(self) -> list[int]:
        """Tokens of each row, (B,)."""
        return [len(row) for row in self._rows]

    def _update(self) -> None:
        if self._cache is None:
            self._cache = self._new_cache()
            refill(self._llm, self._cache, self._columns(0, self.length), self._most_tokens)
        else:
            past = functools.partial(self._columns, 0, self.length)
            update_cache(self._llm, self._cache, self._restore, past, self._most_tokens)

    def _forward(self, new: int) -> torch.Tensor:
        """Run the last `new` tokens of each row, and return the logits after them, (B, V)."""
        with torch.inference_mode():
            logits = self._last_logits(new)
        # A copy outside of that mode, which callers may change in place.
        return logits.to(torch.float32, copy=True)

    def _last_logits(self, new: int) -> torch.Tensor:
        cached = self.length - new
        past = functools.partial(self._columns, 0, cached)
        columns = self._columns(cached, self.length)
        padded = min(map(len, self._rows)) < self.length
        with self._llm.exclusive():
            if self._cache is None:
                self._cache = self._new_cache()
                if cached:
                    refill(self._llm, self._cache, past(), self._most_tokens)
            with step(self._llm, self._cache, self._restore, past, self._most_tokens):
                note_rows(self._cache, self._lengths)  # so that nothing has to read the mask
                with self._interruptible():
                    output = self._llm.model(
                        input_ids=columns.tokens,
                        attention_mask=columns.attention_mask if padded else None,
                        position_ids=columns.position_ids,
                        use_cache=True,
                        logits_to_keep=1,
                        **{self._argument: self._cache},
                    )
        last: torch.Tensor = output.logits[:, -1]
        return last

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Ask `interrupt` in the passes of a ``with`` block; keep what is cached, or free it."""
        if self._interrupt is None:
            yield
            return
        with self._cache.interruptible(self._interrupt) as restore:
            try:
                yield
            except PassInterruptedError:
                if not restore():
                    self._cache = None
                raise

    def _columns(self, first: int, end: int) -> Past:
        """Columns of the matrix of all rows; the mask starts at column 0, as a cache requires."""
        device = self._llm.device
        pads = [self.length - len(row) for row in self._rows]
        rows = [
            [pad] + [0] * (min(end, pad) - first) + row[max(0, first - pad) : max(0, end - pad)]
            for pad, row in zip(pads, self._rows, strict=True)
        ]
        sent = send(torch.tensor(rows), device)  # all in one tensor
        positions = torch.arange(end, device=device) - sent[:, :1]
        return Past(sent[:, 1:], (positions >= 0).long(), positions[:, first:].clamp(min=0))

    def _new_cache(self) -> Any:
        from transformers.cache_utils import DynamicLayer

        cache = InterruptibleCache(config=self._llm.model.config)
        cache.layers = [
            ReservedLayer(self.reserve_tokens) if type(layer) is DynamicLayer else layer
            for layer in cache.layers
        ]
        return cache


def _cached_tokens(layer: Any, length: int) -> int:
    """Tokens that a layer holds of sequences of `length` tokens."""
    return min(length, layer.sliding_window - 1) if layer.is_sliding else length


def _select(layer: Any, length: int, index: Mapping[torch.device, torch.Tensor], cut: int) -> None:
    """Select rows of a layer, and cut off padding on the left that they do not need."""
    if layer.keys is None:
        return
    rows = index[layer.keys.device]
    if isinstance(layer, GroupedLayer):
        layer.select_rows(rows)
        layer.cumulative_length -= cut
        return
    cached = _cached_tokens(layer, length)
    room = getattr(layer, "reserve_tokens", 0)
    for name in ("keys", "values"):
        setattr(layer, name, with_room([getattr(layer, name)[rows]], cached, room))
    if layer.is_sliding:
        layer.cumulative_length -= cut


def _concatenate(mine: Any, theirs: Any, length: int) -> None:
    if isinstance(mine, GroupedLayer):
        mine.append_rows(theirs, length)
        return
    cached = _cached_tokens(mine, length)
    room = getattr(mine, "reserve_tokens", 0)
    for name in ("keys", "values"):
        parts = [getattr(layer, name) for layer in (mine, theirs)]
        setattr(mine, name, with_room(parts, cached, room))
        setattr(theirs, name, None)
    if mine.is_sliding:
        mine.cumulative_length = length
