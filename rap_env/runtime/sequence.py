"""A request inside the engine: its known tokens, its prefill, and the delivery of its output."""

from __future__ import annotations

import logging
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from rap_env.errors import RapError
from rap_env.models.device import send
from rap_env.models.live.live_batch import LiveBatch
from rap_env.models.live.partial_forward import recorded_states
from rap_env.plan import Plan
from rap_env.runtime.memory_estimator import BatchShape
from rap_env.runtime.records import Counters
from rap_env.runtime.request_handle import (
    EndEvent,
    Reason,
    Rejection,
    RequestHandle,
    TokenEvent,
)
from rap_env.runtime.sampling import RowSampler, Sample, sample_rows, scored

if TYPE_CHECKING:
    from rap_env.models.live.elastic import ElasticLLM

log = logging.getLogger(__name__)

NOT_FINITE = "The model returned logits that are not finite."
_POSITIONS = 8
"""Positions of a prompt whose logits are in memory at a time."""


class ReadPlans:
    """Under which plans the tokens of a cache were computed.

    Args:
        spans: For each span of tokens where it ends, and the plans of all tokens up to there.
    """

    def __init__(self, spans: Sequence[tuple[int, frozenset[Plan]]] = ()) -> None:
        self._spans = list(spans)

    def note(self, tokens: int, plan: Plan) -> None:
        """Note that the cache has `tokens` tokens now, the last ones computed under a plan."""
        before = self._spans[-1][1] if self._spans else frozenset()
        if plan in before:
            self._spans[-1] = tokens, before
        else:
            self._spans.append((tokens, before | {plan}))

    def plans(self, tokens: int) -> frozenset[Plan]:
        """The plans of the first so many tokens."""
        index = bisect_left(self._spans, tokens, key=lambda span: span[0])
        return self._spans[index][1]


class TokenSequence:
    """The tokens of one request, and the sampler that draws the next ones.

    Attributes:
        owner: Whose kept sequences it may use; see `KeptSequences`.
        read: The plans under which its cache was computed.
        queued_since_s: When it last entered the queue, on the engine's clock.
        computed_tokens: Most of its tokens that were in a cache so far.
        refills: Whether its cache may be computed again at better levels.
        unkept: Whether keeping it has to go on (see `KeptSequences.put`).
        unfit_bytes: The largest budget in which it did not fit alone above its own floor.
    """

    def __init__(self, handle: RequestHandle, owner: str = "") -> None:
        self.handle = handle
        self.owner = owner
        self.read = ReadPlans()
        self.sampler = RowSampler(handle.params, handle.prompt_ids)
        self.queued_since_s = handle.arrived_s
        self.computed_tokens = 0
        self.refills = True
        self.unkept = False
        self.unfit_bytes = 0

    @property
    def tokens(self) -> list[int]:
        """All known tokens: the prompt's and the generated ones."""
        return [*self.handle.prompt_ids, *self.handle.token_ids]

    @property
    def known_tokens(self) -> int:
        """The number of known tokens."""
        return len(self.handle.prompt_ids) + len(self.handle.token_ids)

    def progress(self, *, in_batch: bool) -> tuple[int, int]:
        """Cached tokens and tokens to come.

        Args:
            in_batch: Whether the sequence is decoding, so that its last token is not cached
                yet; else the numbers hold for the end of its prefill.
        """
        cached = self.known_tokens - in_batch
        return cached, self.handle.final_tokens - cached

    @property
    def scores_prompt(self) -> bool:
        """Whether its whole prompt has to be read, for log-probabilities that it has not got."""
        return self.handle.params.prompt_logprobs and self.handle.prompt_samples is None

    def preempt(self, time_s: float) -> None:
        """Note that the sequence goes back to the queue."""
        self.handle.preemptions += 1
        self.queued_since_s = time_s


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


class OutputProcessor:
    """Samples tokens, delivers tokens and ends to request handles, and counts them.

    `counters` has the totals.
    """

    def __init__(self, clock: Callable[[], float], counters: Counters) -> None:
        self._clock = clock
        self.counters = counters

    def deliver(
        self, sequences: Sequence[TokenSequence], logits: torch.Tensor, plans: Sequence[Plan]
    ) -> list[bool]:
        """Sample a token for each sequence and deliver it.

        Args:
            sequences: B sequences.
            logits: (B, V), float32.
            plans: The plan that each of them was computed with.

        Returns:
            For each sequence whether it continues.
        """
        samples = sample_rows([sequence.sampler for sequence in sequences], logits)
        now = self._clock()
        for sequence, plan in zip(sequences, plans, strict=True):
            sequence.handle.note_plan(plan, now)
        return [
            self._deliver(sequence, sample, plan, now)
            for sequence, sample, plan in zip(sequences, samples, plans, strict=True)
        ]

    def end(
        self,
        sequence: TokenSequence,
        reason: Reason,
        error: str | None = None,
        *,
        rejection: Rejection | None = None,
        stop_token: Sample | None = None,
    ) -> None:
        """End a request, unless it has ended."""
        if not sequence.handle.done:
            if reason == "cancelled":
                self.counters.cancelled += 1
            elif reason == "error":
                self.counters.failed += 1
            else:
                self.counters.served += 1
            end = EndEvent(reason, error, self._clock(), rejection, stop_token)
            sequence.handle.emit(end)

    def reject(self, sequence: TokenSequence, rejection: Rejection, error: str) -> None:
        """End a request that waits in the queue and cannot be admitted."""
        self.counters.refused += 1
        sequence.handle.emit(EndEvent("error", error, self._clock(), rejection))

    def fail(self, sequences: Iterable[TokenSequence], error: Exception) -> None:
        """End requests whose step raised an error."""
        if isinstance(error, RapError):
            log.warning("A step failed: %s", error)
        else:
            log.error("A step failed.", exc_info=error)
        for sequence in sequences:
            self.end(sequence, "error", f"The step failed: {error}")

    def _deliver(
        self, sequence: TokenSequence, sample: Sample | None, plan: Plan, now: float
    ) -> bool:
        handle, params = sequence.handle, sequence.handle.params
        if sample is None:
            reason = sequence.sampler.error
            rejection: Rejection | None = None if reason is None else "constraint"
            self.end(sequence, "error", reason or NOT_FINITE, rejection=rejection)
            return False
        if sample.token_id in params.stop_token_ids:
            self.end(sequence, "stop", stop_token=sample)
            return False
        handle.emit(TokenEvent(sample.token_id, sample.logprob, now, plan, sample.top))
        self.counters.tokens += 1
        if len(handle.token_ids) < params.max_new_tokens:
            return True
        self.end(sequence, "length")
        return False


def shape_of(
    running: Sequence[TokenSequence],
    joining: TokenSequence | None = None,
    steps: int = 0,
    *,
    uniform: bool = False,
) -> BatchShape:
    """The largest batch that sequences will form together, with the strictest of their floors.

    Args:
        running: Sequences that decode.
        joining: A sequence that will join them; all of its known tokens are counted from now
            on.
        steps: Tokens that the running ones generate before it joins.
        uniform: As for `BatchShape.of`.
    """
    rows = []
    for sequence in running:
        cached, to_come = sequence.progress(in_batch=True)
        ahead = min(steps, to_come)
        rows.append((cached + ahead, to_come - ahead))
    if joining is not None:
        rows.append(joining.progress(in_batch=False))
    sequences = [*running, *([] if joining is None else [joining])]
    floors = [sequence.handle.params.max_delta_nll for sequence in sequences]
    floor = min((each for each in floors if each is not None), default=math.inf)
    return replace(BatchShape.of(rows, uniform=uniform), max_delta_nll=floor)
