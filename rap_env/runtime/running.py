"""What runs: the decoding requests, and the one whose prompt is read."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rap_env.models.live.live_batch import LiveBatch
from rap_env.runtime.decision import CachedRow, Snapshot
from rap_env.runtime.executor import Executor
from rap_env.runtime.kept_sequences import KeptSequences, Taken
from rap_env.runtime.memory_estimator import BatchShape, PassSize
from rap_env.runtime.request_handle import EXPECTED_TOKENS
from rap_env.runtime.sequence import PrefillingSequence, TokenSequence, shape_of

if TYPE_CHECKING:
    from rap_env.models.live.elastic import ElasticLLM


_NEW_SHARE = 0.1  # of the last step in the average time of a step
_LEAST_SHARE = 1.0
"""Time that a decode step gives to prompts, as a share of its own, if the target leaves less:
half of all time. Otherwise requests would wait without end on a machine that misses the
target."""


class Pace:
    """Decode steps between two prompt chunks, so that tokens keep coming at a target rate.

    A chunk takes as long as many decode steps. With a target of t seconds between tokens,
    steps of d and a chunk of c, ``c / (t - d)`` steps follow the chunk before the next one.
    The longest time between two tokens is that of a chunk in any case; smaller chunks shorten
    it.

    Args:
        target_itl_s: Mean seconds between the tokens of an answer while prompts are read;
            None for one step between two chunks.

    Attributes:
        decode_s: Seconds of a decode step, as a moving average; 0 before the first one.
    """

    def __init__(self, target_itl_s: float | None) -> None:
        self._target_s = target_itl_s
        self._steps = 0
        self.decode_s = 0.0

    @property
    def decodes_first(self) -> bool:
        """Whether decode steps are due before the next chunk."""
        return self._steps > 0

    def note_chunk(self, seconds: float, waiting: int = 0) -> None:
        """A prompt chunk has taken so long; one of the steps follows it in the same turn.

        Args:
            seconds: What it took.
            waiting: Requests that have not begun: the target is 1 + `waiting` times as long.
        """
        if self._target_s is not None and self.decode_s:
            spare_s = self._target_s * (1 + waiting) - self.decode_s
            self._steps = math.ceil(seconds / max(spare_s, _LEAST_SHARE * self.decode_s))

    def note_step(self, seconds: float) -> None:
        """A decode step has taken so long."""
        self._steps = max(0, self._steps - 1)
        self.decode_s += _NEW_SHARE * (seconds - self.decode_s) if self.decode_s else seconds


class RunningBatch:
    """The decoding sequences, row by row of a batch, and the sequence in prefill, if any.

    A prefill may also be a *refill*: the cache of a decoding sequence is computed again at
    the levels of the plan, while the sequence decodes with the old one. That is for caches of
    which there are no copies: without a disk, and with sliding windows.

    Args:
        executor: Ends a chunk of a prefill when the budget falls.
        kept: Sequences that were read before, preempted ones included.
        chunk_tokens: Most tokens of a prefill chunk.

    Attributes:
        kept: As given; so is `chunk_tokens`.
        rows: The batch.
        decoding: Its sequences, in the order of its rows.
        prefilling: The sequence in prefill or refill.
    """

    def __init__(
        self,
        executor: Executor,
        kept: KeptSequences,
        chunk_tokens: int,
    ) -> None:
        self._executor = executor
        self._llm: ElasticLLM = executor.controller.llm
        self.chunk_tokens = chunk_tokens
        self.kept = kept
        windows = executor.controller.estimator.memory.facts.kv_window_tokens
        self._uniform = any(window is not None for window in windows)
        self._shape: BatchShape | None = None  # None: to be computed
        self.rows = self.new_rows()
        self.decoding: list[TokenSequence] = []
        self.prefilling: PrefillingSequence | None = None

    @property
    def refilling(self) -> PrefillingSequence | None:
        """The refill, if there is one."""
        prefilling = self.prefilling
        return prefilling if prefilling is not None and prefilling.refills else None

    @property
    def sequences(self) -> list[TokenSequence]:
        """All sequences: those that decode, and the one in prefill."""
        prefilling = None if self.refilling else self.prefilling
        return [*self.decoding, *([prefilling.sequence] if prefilling else [])]

    @property
    def newest(self) -> TokenSequence:
        """The sequence in prefill, else the decoding one that arrived last."""
        if self.prefilling is not None and not self.refilling:
            return self.prefilling.sequence
        return max(self.decoding, key=lambda sequence: sequence.handle.id)

    @property
    def intact(self) -> bool:
        """Whether each decoding sequence has its row: no change of rows has failed."""
        return self.rows.size == len(self.decoding)

    @property
    def shape(self) -> BatchShape:
        """The largest batch that all sequences will form; an old cache that is refilled is kept."""
        kept_bytes, refilling = 0, self.refilling
        if refilling is not None:
            kept_bytes = self.rows.row_bytes(self.decoding.index(refilling.sequence))
        if self._shape is None:
            joining, chunks = None, 0
            if self.prefilling and not (refilling or self.prefilling.sequence.handle.done):
                joining, chunks = self.prefilling.sequence, self.prefilling.chunks_left
            running = [sequence for sequence in self.decoding if not sequence.handle.done]
            self._shape = shape_of(running, joining, chunks, uniform=self._uniform)
        return replace(self._shape, kept_bytes=kept_bytes) if kept_bytes else self._shape

    def shape_with(self, sequence: TokenSequence, unread: int, chunk_tokens: int) -> BatchShape:
        """The largest batch with a sequence that joins after `unread` tokens were read."""
        chunks = -(-unread // chunk_tokens)
        return shape_of(self.decoding, sequence, chunks, uniform=self._uniform)

    def shape_alone(self, sequence: TokenSequence) -> BatchShape:
        """The shape of a sequence with nothing else running."""
        return shape_of([], sequence, uniform=self._uniform)

    def pass_size(self, *, prefill: bool) -> PassSize:
        """The size of the next pass: a prefill chunk if there is one, or a decode step."""
        rows, prefilling = len(self.decoding), self.prefilling
        if prefilling is None or not prefill:
            return PassSize(rows, rows, prefills=prefilling is not None)
        tokens = growth = prefilling.next_tokens
        joins = prefilling.chunks_left == 1 and not prefilling.refills
        if joins and rows:  # the batch pads shorter rows
            length, final = self.rows.length, prefilling.batch.length + tokens
            growth = (rows + 1) * max(length, final) - rows * length - prefilling.batch.length
        return PassSize(tokens, growth)

    def snapshot(self, *, prefill: bool) -> Snapshot:
        """What a decision before the next pass has to know of the batch."""
        return Snapshot(
            running=self.shape,
            next_pass=self.pass_size(prefill=prefill),
            rows_plan=self.rows.lowest_plan,
            newest=self.newest if self.sequences else None,
            refills=self.refilling is not None,
        )

    def prefill(
        self, sequence: TokenSequence, chunk_tokens: int, *, refills: bool = False
    ) -> Taken:
        """Begin to read a sequence's tokens, in chunks, or those of a decoding one again.

        Returns:
            What is kept of them and not read.
        """
        batch = self.new_rows(chunk_tokens)
        if refills or not self.decoding:  # else its cache will be copied into the batch's
            batch.reserve_tokens = sum(sequence.progress(in_batch=refills))
        taken = Taken() if refills else self.kept.take(sequence, batch)
        self.prefilling = PrefillingSequence(
            sequence, batch, self._llm, chunk_tokens, refills=refills
        )
        self._shape = None
        return taken

    def refillable(self) -> tuple[CachedRow, ...]:
        """The decoding rows whose caches do not have the levels of the plan, and could."""
        plan = self._llm.plan
        return tuple(
            CachedRow(sequence, own, *sequence.progress(in_batch=True))
            for sequence, own in zip(self.decoding, self.rows.plans, strict=True)
            if own != plan and sequence.refills
        )

    def join(self) -> None:
        """Let the prefilled sequence decode; after a refill, with its new cache."""
        prefilled = self.prefilling
        if prefilled is None:
            return
        self.prefilling = None
        sequence = prefilled.sequence
        if prefilled.refills:
            self.remove([sequence])
        self._reserve([*self.decoding, sequence])
        self.rows.join(prefilled.batch)
        sequence.read = prefilled.read
        self.decoding.append(sequence)
        self._shape = None

    def note_tokens(self) -> None:
        """After a step: expect more of answers that have all the tokens expected so far."""
        lengths = [len(sequence.handle.token_ids) for sequence in self.decoding]
        if not all(length % EXPECTED_TOKENS for length in lengths):
            self._reserve(self.decoding)
            self._shape = None

    def preempt(self, sequence: TokenSequence) -> None:
        """Remove a sequence that will continue, and keep what it has cached."""
        self.keep(sequence, waiting=True)
        self.remove([sequence])

    def keep(self, sequence: TokenSequence, *, waiting: bool = False) -> None:
        """Keep what a sequence has cached; arguments as of `KeptSequences.put`."""
        batch, row, read = self.rows, 0, sequence.read
        prefilling = None if self.refilling else self.prefilling
        if prefilling is not None and prefilling.sequence is sequence:
            batch, read = prefilling.batch, prefilling.read
        else:
            row = self.decoding.index(sequence)
        sequence.unkept, self._shape = False, None
        if batch.size:
            cached = batch.cached_row(row)
            sequence.unkept = self.kept.put(sequence, cached, read, self.shape, waiting=waiting)

    def remove(self, sequences: Collection[TokenSequence]) -> None:
        """Remove sequences, with a refill or a prefill of theirs."""
        if self.prefilling is not None and self.prefilling.sequence in sequences:
            self.drop_prefill()
        kept = [row for row, each in enumerate(self.decoding) if each not in sequences]
        decoding = [self.decoding[row] for row in kept]
        self._reserve(decoding)
        self.rows.keep(kept)
        self.decoding, self._shape = decoding, None

    def drop_prefill(self) -> None:
        """End the prefill or refill, and free its cache."""
        if self.prefilling is not None:
            self.prefilling.batch.close()
        self.prefilling = self._shape = None

    def clear(self) -> None:
        """Remove everything, whatever state it is in."""
        self.drop_prefill()
        self.rows.close()
        self.rows = self.new_rows()
        self.decoding = []

    def new_rows(self, chunk_tokens: int | None = None) -> LiveBatch:
        """An empty batch, whose passes end when the budget falls if they are chunks."""
        return LiveBatch(
            self._llm,
            most_tokens=chunk_tokens or self.chunk_tokens,
            interrupt=None if chunk_tokens is None else self._executor.must_interrupt,
            copies=self.kept.files.folder,
        )

    def _reserve(self, sequences: Sequence[TokenSequence]) -> None:
        """Let the batch of these sequences have room until the first of them ends."""
        progress = [sequence.progress(in_batch=True) for sequence in sequences]
        if progress:
            cached, to_come = zip(*progress, strict=True)
            self.rows.reserve_tokens = max(cached) + min(to_come)
