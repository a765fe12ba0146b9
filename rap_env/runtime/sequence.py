"""A request as the engine works on it: the tokens that it has, and those that are to come."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from rap_env.llm.live_batch import LiveBatch
from rap_env.runtime.batch_shape import BatchShape
from rap_env.runtime.request_handle import RequestHandle
from rap_env.runtime.sampling import RowSampler

if TYPE_CHECKING:
    from rap_env.llm.elastic import ElasticLLM
    from rap_env.llm.live import Restore


class TokenSequence:
    """A request handle, with the random stream that its tokens are drawn from.

    Args:
        handle: The handle.

    Attributes:
        handle: As given.
        sampler: Draws its tokens.
        waits_since_s: Since when it has been in line, on the engine's clock.
    """

    def __init__(self, handle: RequestHandle) -> None:
        self.handle = handle
        self.sampler = RowSampler(handle.params)
        self.waits_since_s = handle.arrived_s

    @property
    def tokens(self) -> list[int]:
        """All tokens known: those of the prompt and those generated."""
        return [*self.handle.prompt_ids, *self.handle.token_ids]

    @property
    def known_tokens(self) -> int:
        """How many these are."""
        return len(self.handle.prompt_ids) + len(self.handle.token_ids)

    @property
    def pending(self) -> int:
        """The last token, which the model has not seen yet."""
        return self.handle.token_ids[-1]

    @property
    def final_tokens(self) -> int:
        """Most tokens that the model will see of it: the last one generated is not run."""
        return len(self.handle.prompt_ids) + self.handle.params.max_new_tokens - 1

    def progress(self, *, in_batch: bool) -> tuple[int, int]:
        """Tokens that the cache holds and tokens to come.

        Args:
            in_batch: Whether it is decoding, so that its last token is not in the cache; else
                what holds once all known tokens are.
        """
        known = self.known_tokens - in_batch
        return known, self.final_tokens - known


class PrefillingSequence:
    """A sequence whose prompt is run in chunks, in a batch of its own.

    Args:
        sequence: The sequence.
        llm: The live model.
        restore: As for `LiveBatch`.
        chunk_tokens: Most tokens of a chunk.
    """

    def __init__(
        self, sequence: TokenSequence, llm: ElasticLLM, restore: Restore, chunk_tokens: int
    ) -> None:
        self.sequence = sequence
        self.batch = LiveBatch(llm, restore=restore, most_tokens=chunk_tokens)
        self._left: Sequence[int] = sequence.tokens
        self._chunk_tokens = chunk_tokens

    @property
    def steps_left(self) -> int:
        """Chunks that are still to be run."""
        return -(-len(self._left) // self._chunk_tokens)

    @property
    def next_tokens(self) -> int:
        """Tokens of the next chunk."""
        return min(len(self._left), self._chunk_tokens)

    def advance(self) -> tuple[torch.Tensor | None, int]:
        """Run the next chunk.

        Returns:
            Logits after the last token, (1, V), or None while there are more chunks; and the
            number of tokens run.
        """
        chunk, self._left = self._left[: self._chunk_tokens], self._left[self._chunk_tokens :]
        logits = self.batch.append([chunk]) if self.batch.size else self.batch.prefill([chunk])
        return (None if self._left else logits), len(chunk)


def shape_of(
    running: Iterable[TokenSequence],
    prefilling: TokenSequence | None = None,
    steps: int = 0,
    *,
    uniform: bool = False,
) -> BatchShape:
    """The most that sequences will hold together.

    Args:
        running: Jobs that decode.
        prefilling: One that will join them, its prompt counted in full from now on.
        steps: Tokens that the others will be ahead by the time it joins.
        uniform: As for `BatchShape.of`.
    """
    rows = []
    for sequence in running:
        held, coming = sequence.progress(in_batch=True)
        ahead = min(steps, coming)
        rows.append((held + ahead, coming - ahead))
    if prefilling is not None:
        rows.append(prefilling.progress(in_batch=False))
    return BatchShape.of(rows, uniform=uniform)
