"""What runs: the decoding requests, and the one whose prompt is read."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from rap_env.errors import RapError
from rap_env.models.device import send
from rap_env.models.live.live_batch import LiveBatch
from rap_env.models.live.partial_forward import recorded_states
from rap_env.runtime.controller import RuntimeController
from rap_env.runtime.decision import CachedRow, Snapshot
from rap_env.runtime.kept_sequences import KeptSequences
from rap_env.runtime.memory_estimator import BatchShape, PassSize
from rap_env.runtime.request_handle import (
    EXPECTED_TOKENS,
    NOT_FINITE,
    ReadPlans,
    Taken,
    TokenSequence,
)
from rap_env.runtime.sampling import Sample, scored

if TYPE_CHECKING:
    from rap_env.models.live.elastic import ElasticLLM


_POSITIONS = 8
"""Positions of a prompt whose logits are in memory at a time."""


class PrefillingSequence:
    """A sequence whose known tokens are prefilled in chunks, in its own batch.

    Args:
        sequence: The sequence.
        batch: A batch for it: empty, or with what was kept of the beginning of its tokens.
        llm: The live model.
        chunk_tokens: Most tokens of a chunk.
        refills: Whether it decodes meanwhile, with another cache that this one will replace.
            Then its last token is left out, as decoding does.

    Attributes:
        read: The plans under which the batch was computed.
    """

    def __init__(
        self,
        sequence: TokenSequence,
        batch: LiveBatch,
        llm: ElasticLLM,
        chunk_tokens: int,
        *,
        refills: bool = False,
    ) -> None:
        self.sequence = sequence
        self.refills = refills
        self.batch = batch
        self.read = sequence.read if batch.size else ReadPlans()
        self._llm = llm
        self._chunk_tokens = chunk_tokens
        self._prompt_samples: list[Sample] = []

    @property
    def tokens_left(self) -> int:
        """Tokens that are not prefilled yet."""
        return self.sequence.known_tokens - self.refills - self.batch.length

    @property
    def chunks_left(self) -> int:
        """Chunks that are not prefilled yet."""
        return -(-self.tokens_left // self._chunk_tokens)

    @property
    def next_tokens(self) -> int:
        """Tokens of the next chunk."""
        return min(self.tokens_left, self._chunk_tokens)

    def advance(self) -> tuple[torch.Tensor | None, int]:
        """Prefill the next chunk.

        Returns:
            Logits after the last token, (1, V), or None if more chunks are left; and the
            number of tokens in the chunk.

        Raises:
            RapError: The prompt's log-probabilities are wanted, and logits are not finite.
            PassInterruptedError: `interrupt` has ended the chunk. The next call repeats it.
        """
        cached = self.batch.length
        chunk = self.sequence.tokens[cached : cached + self.next_tokens]
        run = self.batch.append if self.batch.size else self.batch.prefill
        scores = self.sequence.scores_prompt
        recording: AbstractContextManager[list[torch.Tensor]] = nullcontext([])
        if scores:
            recording = recorded_states(self._llm)
        with recording as states:
            logits = run([chunk])
        self.read.note(self.batch.length, self.batch.plans[0])
        if scores:
            self._score(torch.cat(states, dim=1)[0, -len(chunk) :], cached + 1)
            if not self.tokens_left:
                self.sequence.handle.prompt_samples = tuple(self._prompt_samples)
        return (None if self.tokens_left else logits), len(chunk)

    @torch.no_grad()
    def _score(self, states: torch.Tensor, first: int) -> None:
        """Note the log-probabilities of the prompt's tokens from `first` on.

        Args:
            states: The last hidden states at the tokens before them, (T, width).
            first: The index of a token.
        """
        prompt, params = self.sequence.handle.prompt_ids, self.sequence.handle.params
        head = self._llm.model.get_output_embeddings()
        for some in torch.split(states, _POSITIONS):
            tokens = prompt[first : first + len(some)]
            logits = self._llm.adapter.cap_logits(head(some[: len(tokens)]).float())
            index = send(torch.tensor(tokens, dtype=torch.long), logits.device)
            for sample in scored(logits, index, [params.top_logprobs or 0] * len(tokens)):
                if sample is None:
                    raise RapError(NOT_FINITE)
                self._prompt_samples.append(sample)
            first += len(tokens)


class RunningBatch:
    """The decoding sequences, row by row of a batch, and the sequence in prefill, if any.

    A prefill may also be a *refill*: the cache of a decoding sequence is computed again at
    the levels of the plan, while the sequence decodes with the old one. That is for caches of
    which there are no copies: without a disk, and with sliding windows.

    Args:
        controller: Ends a chunk of a prefill when the budget falls.
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
        controller: RuntimeController,
        kept: KeptSequences,
        chunk_tokens: int,
    ) -> None:
        self._controller = controller
        self._llm: ElasticLLM = controller.llm
        self.chunk_tokens = chunk_tokens
        self.kept = kept
        windows = controller.estimator.memory.facts.kv_window_tokens
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
            self._shape = self.shape_of(running, joining, chunks)
        return replace(self._shape, kept_bytes=kept_bytes) if kept_bytes else self._shape

    def shape_of(
        self,
        running: Sequence[TokenSequence],
        joining: TokenSequence | None = None,
        steps: int = 0,
    ) -> BatchShape:
        """The largest batch that sequences will form, with the strictest of their floors.

        Args:
            running: Sequences that decode.
            joining: A sequence that will join them; all of its known tokens are counted from
                now on.
            steps: Tokens that the running ones generate before it joins.
        """
        rows = []
        for sequence in running:
            cached, to_come = sequence.progress(in_batch=True)
            ahead = min(steps, to_come)
            rows.append((cached + ahead, to_come - ahead))
        if joining is not None:
            rows.append(joining.progress(in_batch=False))
            running = [*running, joining]
        floors = [sequence.handle.params.max_delta_nll for sequence in running]
        floor = min((each for each in floors if each is not None), default=math.inf)
        return replace(BatchShape.of(rows, uniform=self._uniform), max_delta_nll=floor)

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
            rows_plan=self.rows.lowest_plan if self.decoding else self._llm.plan,
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
        interrupt = partial(self._controller.must_interrupt, self.kept)
        return LiveBatch(
            self._llm,
            most_tokens=chunk_tokens or self.chunk_tokens,
            interrupt=None if chunk_tokens is None else interrupt,
            copies=self.kept.files.folder,
        )

    def _reserve(self, sequences: Sequence[TokenSequence]) -> None:
        """Let the batch of these sequences have room until the first of them ends."""
        progress = [sequence.progress(in_batch=True) for sequence in sequences]
        if progress:
            cached, to_come = zip(*progress, strict=True)
            self.rows.reserve_tokens = max(cached) + min(to_come)
