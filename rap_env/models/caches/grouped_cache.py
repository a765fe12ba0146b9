"""A layer of a KV cache that stores groups of tokens at a level below native.

Shapes: B sequences (rows), K key and value heads, D channels of a head, Q columns of a step,
T columns so far, G stored groups.

Rows are left-aligned: token n of a row is in its group ``n // 32``, whatever padding the
batch has. Finished groups are stored packed (`models.caches.groups`) in *slots*; the group
that a row's next token continues is the *tail*, unquantised. A group leaves the tail when the
first token of the next group arrives. For transformers the layer has columns as its own
layers do, padding included.

::

    tokens of a row    0 .. 31     32 .. 63     64 .. 95     96 .. 104
    group              0           1            2            3: the tail
    all are kept       slot 0      slot 1       slot 2       keys and values, [:, :, :9]
    window of 1 group  slot 0      slot 1       slot 1       the same
                       (a sink)    (overwritten by group 2)

Under a window the first slots keep the sinks (`SINK_GROUPS`), and later groups take the
others in turn, as a ring. The model's own sliding window has no sinks.

`GroupedLayer.update` returns a `Chunk` in place of keys and values; only the attention of
`rap_env.models.caches.attention` understands it. For one new token of each row the chunk is
the layer itself. Else it has a *bundle* for rows with equal numbers of tokens before and
after: their tail and new tokens, the slots as they were before, and the groups that the new
tokens completed.

Before a group is packed, its native keys and values may be copied to a file (`copies`), from
which `caches.kv_cache.read_back` restores them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from rap_env.errors import UnsupportedCacheError
from rap_env.levels import GROUP_TOKENS, SINK_GROUPS, CacheLevel
from rap_env.models.caches.groups import (
    CURRENT,
    Bundle,
    Chunk,
    ForwardPass,
    Groups,
    equal_rows,
    in_groups,
    pack,
    stored_groups,
    widen,
)
from rap_env.models.caches.tensor_file import NativeCopy, NewCopies
from rap_env.models.device import send

_PIECE_GROUPS = 16
"""Groups of equal rows that are requantised together."""


class GroupedLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """One attention block's keys and values at a level.

    Args:
        level: Not native.
        sliding_window: Tokens that the model's own attention sees, itself included, or None.

    Attributes:
        keys: The tail of keys, (B, K, 32, D); None without rows.
        values: The tail of values.
        groups: Stored groups, tensors of shape (B, K, G, ...).
        lengths: Tokens of each row, without padding, (B,).
        copies: For each row its groups as they were before they were stored, or None, (B,).
        new_copies: Makes them for the next rows; None for no copies.
        cumulative_length: Columns so far, padding included.
        reserve_tokens: As for `ReservedLayer`, for the layer that replaces this one.
    """

    reserve_tokens = 0
    is_croppable = False
    keys: Any  # a tensor, or None without rows
    values: Any

    def __init__(self, level: CacheLevel, sliding_window: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.level = level
        self.is_sliding = sliding_window is not None
        self.sliding_window = sliding_window
        self.groups: Groups = ()
        self.lengths: list[int] = []
        self.cumulative_length = 0
        self.copies: list[NativeCopy | None] = []
        self.new_copies: NewCopies | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make an empty tail for rows such as those of the given states."""
        batch, heads, _, size = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        shape = (batch, heads, GROUP_TOKENS, size)
        self.keys, self.values = key_states.new_zeros(shape), value_states.new_zeros(shape)
        self.groups = pack(self.level.bits, in_groups(self.keys, 0), in_groups(self.values, 0))
        self.lengths = [0] * batch
        self.copies = [None] * batch if self.new_copies is None else [*self.new_copies(batch)]
        self.new_copies = None
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[Any, Any]:
        """Add the new columns, (B, K, Q, D) each; returns a `Chunk` twice."""
        batch, _, queries, _ = key_states.shape
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        step = self._step(batch, queries)
        self.cumulative_length += queries
        if queries == 1 and all(a > b for a, b in zip(step.after, self.lengths, strict=True)):
            self._append(key_states, value_states, step)
            chunk = Chunk(self.level, self.sliding_window, step, token=self)
        else:
            chunk = self._extend(key_states, value_states, step)
        self.lengths = list(step.after)
        return chunk, chunk

    def _step(self, batch: int, queries: int) -> ForwardPass:
        step, columns = CURRENT.step, self.cumulative_length + queries
        if step is None or len(step.after) != batch or step.columns != columns:
            return ForwardPass(self.lengths, [n + queries for n in self.lengths], columns)
        if step.before != self.lengths:
            raise UnsupportedCacheError(
                f"The cache holds {self.lengths} tokens of its rows, but the attention mask has "
                f"{step.before} before the new ones. Give the mask of all tokens so far."
            )
        return step

    def _append(
        self, key_states: torch.Tensor, value_states: torch.Tensor, step: ForwardPass
    ) -> None:
        for tokens in {n for n in self.lengths if n and n % GROUP_TOKENS == 0}:  # full tails
            self._make_room(step.after)
            rows = [row for row, length in enumerate(self.lengths) if length == tokens]
            index = self._index(rows)
            tails = (states[index][:, :, None] for states in (self.keys, self.values))
            self._pack(rows, tokens // GROUP_TOKENS - 1, *tails)
        rows_of_tail, tokens_of_tail = self._tail_places(step)
        self.keys[rows_of_tail, :, tokens_of_tail] = key_states[:, :, 0]
        self.values[rows_of_tail, :, tokens_of_tail] = value_states[:, :, 0]

    def _tail_places(self, step: ForwardPass) -> tuple[torch.Tensor, torch.Tensor]:
        """Where each row's new token goes in the tail: rows and tokens, which all layers share."""
        key = ("tail places", self.device)
        if key not in step.memo:
            within = torch.tensor([n % GROUP_TOKENS for n in self.lengths])
            rows = torch.arange(len(within), device=self.device)
            step.memo[key] = (rows, send(within, self.device))
        places: tuple[torch.Tensor, torch.Tensor] = step.memo[key]
        return places

    def _extend(
        self, key_states: torch.Tensor, value_states: torch.Tensor, step: ForwardPass
    ) -> Chunk:
        # The chunk's first tokens see the groups that its last ones replace.
        before = self.groups
        self._make_room(step.after)
        bundles = []
        for (cached, after), rows in equal_rows(self.lengths, step.after).items():
            index = self._index(rows)
            new, first = after - cached, stored_groups(cached)
            tail = cached - first * GROUP_TOKENS
            keys, values = (
                torch.cat([tails[index][:, :, :tail], states[index][:, :, -new:]], dim=2)
                for tails, states in ((self.keys, key_states), (self.values, value_states))
            )
            slots = self._slots(cached)
            stored = self._fill(rows, first, keys, values)
            later = widen(self.level.bits, stored, self.dtype)
            bundles.append(
                Bundle(
                    rows if index is rows else None, cached, new, keys, values, before, slots, later
                )
            )
        return Chunk(self.level, self.sliding_window, step, tuple(bundles))

    def _fill(
        self, rows: list[int], first: int, keys: torch.Tensor, values: torch.Tensor
    ) -> Groups:
        """Store rows' tokens from the start of group `first` on, (b, K, tokens, D); the last stay.

        Returns:
            The groups that were complete, as they are stored.
        """
        index, count = self._index(rows), stored_groups(keys.shape[2])
        done = count * GROUP_TOKENS
        stored = self._pack(rows, first, in_groups(keys, count), in_groups(values, count))
        self.keys[index, :, : keys.shape[2] - done] = keys[:, :, done:]
        self.values[index, :, : keys.shape[2] - done] = values[:, :, done:]
        return stored

    def _pack(
        self, rows: list[int], first: int, keys: torch.Tensor, values: torch.Tensor
    ) -> Groups:
        """Store rows' groups from `first` on, (b, K, G, 32, D) each, and return them packed."""
        stored = pack(self.level.bits, keys, values)
        self._store(rows, first, stored)
        for place, row in enumerate(rows if keys.shape[2] else ()):
            if (copy := self.copies[row]) is not None:
                copy.write(first, torch.stack([keys[place], values[place]]))
        return stored

    @classmethod
    def of_native(
        cls, level: CacheLevel, layer: Any, lengths: Sequence[int], copies: NewCopies | None = None
    ) -> GroupedLayer:
        """The tokens of a dynamic layer with rows of these lengths, padded on the left."""
        made = cls(level, layer.sliding_window if layer.is_sliding else None)
        made.new_copies = copies
        made.lazy_initialization(layer.keys, layer.values)
        made.cumulative_length = layer.get_seq_length()
        made.lengths = list(lengths)
        made._grow(lengths)
        cached = layer.keys.shape[2]
        for (_, length), rows in equal_rows([0] * len(lengths), lengths).items():
            kept = min(cached, length)
            # A sliding window may have lost the start of a group; copies of the first token
            # left take its place. No later token sees them.
            first, lost = divmod(length - kept, GROUP_TOKENS)
            parts = (
                t[made._index(rows)][:, :, cached - kept :] for t in (layer.keys, layer.values)
            )
            if lost:
                parts = (torch.cat([t[:, :, :1]] * lost + [t], dim=2) for t in parts)
            made._fill(rows, first, *parts)
        return made

    def lowered(self, level: CacheLevel) -> GroupedLayer:
        """The same tokens at another level, which keeps no more tokens than this one."""
        made = GroupedLayer(level, self.sliding_window)
        made.reserve_tokens = self.reserve_tokens
        made.lazy_initialization(self.keys, self.values)
        made.copies = self.copies
        made.keys, made.values = self.keys, self.values
        made.lengths, made.cumulative_length = self.lengths, self.cumulative_length
        made._grow(self.lengths)
        for (_, length), rows in equal_rows([0] * len(self.lengths), self.lengths).items():
            slots = self._slots(length)
            own = stored_groups(length)
            kept = {
                slot: made._slot(group)
                for slot, group in enumerate(slots)
                if group >= 0 and level.sees(own, group)
            }
            old = list(kept)
            for start in range(0, len(old), _PIECE_GROUPS):
                piece = old[start : start + _PIECE_GROUPS]
                place = torch.tensor(rows, device=self.device)[:, None]
                old_place = torch.tensor(piece, device=self.device)
                new_place = torch.tensor([kept[slot] for slot in piece], device=self.device)
                cached = tuple(t[place, :, old_place] for t in self.groups)  # (b, P, K, ...)
                if level.bits != self.level.bits:
                    cached = pack(level.bits, *widen(self.level.bits, cached, self.dtype))
                for mine, new in zip(made.groups, cached, strict=True):
                    mine[place, :, new_place] = new
        return made

    def undo(self) -> Callable[[], None]:
        """What takes tokens that are appended from now on off the layer again."""
        tails = self.keys.clone(), self.values.clone()
        lengths, columns = list(self.lengths), self.cumulative_length
        # Later groups are put into a copy.
        ring = None if self._ring() is None else self.groups

        def undo() -> None:
            self.keys, self.values = tails
            self.lengths, self.cumulative_length = lengths, columns
            if ring is not None:
                self.groups = ring

        return undo

    def _ring(self) -> tuple[int, int] | None:
        """Slots that are kept and slots that are reused in turn; None if all groups are kept."""
        model = window = None
        if self.sliding_window is not None:
            model = -(-(self.sliding_window - 1) // GROUP_TOKENS)
        if self.level.window_tokens is not None:
            window = self.level.window_tokens // GROUP_TOKENS
        if window is not None and (model is None or window + SINK_GROUPS <= model):
            return SINK_GROUPS, window
        return None if model is None else (0, model)

    def _slot(self, group: int) -> int:
        ring = self._ring()
        if ring is None or group < ring[0]:
            return group
        return ring[0] + (group - ring[0]) % ring[1] if ring[1] else -1

    def _slots(self, tokens: int) -> list[int]:
        """The group in each slot for a row of `tokens` tokens, -1 for none."""
        slots = [-1] * self.capacity
        for group in range(stored_groups(tokens)) if tokens else ():
            slot = self._slot(group)
            if slot >= 0:
                slots[slot] = group
        return slots

    @property
    def capacity(self) -> int:
        """G, slots for stored groups."""
        return self.groups[0].shape[2] if self.groups else 0

    def slot_groups(self) -> torch.Tensor:
        """The group in each slot of each row, -1 for none, (B, G), on the CPU."""
        slots = {cached: self._slots(cached) for cached in set(self.lengths)}
        rows = [slots[cached] for cached in self.lengths]
        return torch.tensor(rows, dtype=torch.long).view(len(rows), -1)

    def _make_room(self, after: Sequence[int]) -> None:
        """Make slots for rows of these lengths; the ring of a window is copied in any case."""
        if not self._grow(after) and self._ring() is not None:
            self.groups = tuple(tensor.clone() for tensor in self.groups)

    def _grow(self, after: Sequence[int]) -> bool:
        """Make slots for rows of these lengths; returns whether tensors were copied."""
        more = self._slots_for(after) - self.capacity
        if more <= 0:
            return False
        self.groups = tuple(
            torch.cat([t, t.new_zeros((*t.shape[:2], more, *t.shape[3:]))], dim=2)
            for t in self.groups
        )
        return True

    def _store(self, rows: list[int], first: int, stored: Groups) -> None:
        index, count = self._index(rows), stored[0].shape[2]
        if self._ring() is None:
            for mine, new in zip(self.groups, stored, strict=True):
                mine[index, :, first : first + count] = new
            return
        kept = {self._slot(first + n): n for n in range(count)}  # the last one of each slot
        for slot, number in kept.items():
            if slot >= 0:
                for mine, new in zip(self.groups, stored, strict=True):
                    mine[index, :, slot] = new[:, :, number]

    def _index(self, rows: list[int]) -> Any:
        """What selects rows of a tensor: all of them as a view."""
        return slice(None) if len(rows) == len(self.lengths) else rows

    def _slots_for(self, lengths: Sequence[int]) -> int:
        model = None if self.sliding_window is None else self.sliding_window - 1
        longest = max(lengths, default=0)
        return self.level.groups_held(longest, model) if longest else 0

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All tensors that the layer holds."""
        return (self.keys, self.values, *self.groups) if self.is_initialized else ()

    def get_seq_length(self) -> int:
        """Columns so far, padding included."""
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The length and offset of the columns that a mask must have, as for unquantised layers."""
        cached = self.cumulative_length
        if self.sliding_window is None:
            return cached + query_length, 0
        return min(cached, self.sliding_window - 1) + query_length, max(
            cached - self.sliding_window + 1, 0
        )

    def get_max_length(self) -> int:
        """The sliding window, or -1 for no limit."""
        return -1 if self.sliding_window is None else self.sliding_window

    get_max_cache_shape = get_max_length  # its name in transformers before 5.24

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keep some rows, in this order; a row may be repeated."""
        if not self.is_initialized:
            return
        self.keys, self.values = self.keys[rows], self.values[rows]
        self.lengths = [self.lengths[row] for row in rows.tolist()]
        self.copies = [self.copies[row] for row in rows.tolist()]
        slots = self._slots_for(self.lengths)
        self.groups = tuple(tensor[rows, :, :slots] for tensor in self.groups)

    def append_rows(self, other: GroupedLayer, columns: int) -> None:
        """Append the rows of another layer at the same level, which is empty afterwards."""
        lengths = self.lengths + other.lengths
        for layer in (self, other):
            layer._grow(lengths)
        self.keys = torch.cat([self.keys, other.keys])
        self.values = torch.cat([self.values, other.values])
        pairs = zip(self.groups, other.groups, strict=True)
        self.groups = tuple(torch.cat(pair) for pair in pairs)
        self.lengths, self.cumulative_length = lengths, columns
        self.copies = self.copies + other.copies
        other.reset()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorder rows for a beam search."""
        self.select_rows(beam_idx)

    def reset(self) -> None:
        """Free everything; the layer can be filled again."""
        self.keys = self.values = None
        self.groups, self.lengths, self.copies, self.cumulative_length = (), [], [], 0
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Remove no token: groups cannot be taken apart."""
        if tokens_to_remove:
            raise UnsupportedCacheError(
                f"A cache at level {self.level.name} cannot remove tokens again: finished groups "
                "are quantised. Use a native cache for decoding methods that do so."
            )
