"""The sizes that memory is estimated for: of a batch at its largest, and of the next pass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from rap_env.errors import InvalidRequestError
from rap_env.importance.text_kinds import Shares, mean_shares
from rap_env.request import Request


@dataclass(frozen=True, order=True)
class QualityBound:
    """A bound on the plans that may serve a batch.

    Attributes:
        seq_len_tokens: Length at which the plan's rise in NLL is predicted.
        max_delta_nll: Largest rise in NLL that may be predicted, nats per token.
        text_shares: Kinds of text on which it is predicted; see `TextKinds.shares`.
    """

    seq_len_tokens: int
    max_delta_nll: float
    text_shares: Shares = ()


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
        rows: Most sequences at any time, at least `batch_size`: the batch may have more of them
            while they are shorter, and a cache in groups takes some bytes for each.
        longest_tokens: Tokens of the longest sequence at its end, without padding; it may be longer
            than those of the largest batch. By default `seq_len_tokens`.
        bounds: What its requests demand of the plan besides the server's own floor.
        text_shares: Kinds of text in its prompts, as the policy tells them; see `TextKinds.shares`.
        kept_bytes: Bytes of caches in memory beside those of the batch.

    Raises:
        InvalidRequestError: One of them is negative, or one is 0 and the other is not.
    """

    batch_size: int = 0
    seq_len_tokens: int = 0
    rows: int = 0
    longest_tokens: int = field(default=0, repr=False)
    bounds: tuple[QualityBound, ...] = field(default=(), repr=False)
    text_shares: Shares = field(default=(), repr=False)
    kept_bytes: int = field(default=0, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", max(self.rows, self.batch_size))
        if not self.longest_tokens:
            object.__setattr__(self, "longest_tokens", self.seq_len_tokens)
        if min(self.batch_size, self.seq_len_tokens) < 0 or (
            (self.batch_size == 0) != (self.seq_len_tokens == 0)
        ):
            raise InvalidRequestError(
                "A batch shape needs a positive number of sequences and of tokens, or 0 of both; "
                f"it was {self.batch_size} x {self.seq_len_tokens}."
            )

    def __bool__(self) -> bool:
        return self.batch_size > 0

    def with_texts(self, texts: Iterable[Shares]) -> BatchShape:
        """This shape with the kinds of text of its prompts."""
        shares = mean_shares(list(texts))
        return self if shares == self.text_shares else replace(self, text_shares=shares)

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

        All rows grow by a token a step. A row leaves when it has no tokens to come, and padding
        that all other rows share is removed then. So the batch is largest just before some row
        leaves: the rows still present x tokens of the longest of them.

        Args:
            rows: Cached tokens and tokens to come, for each row.
            uniform: Count all rows at the greatest final length instead. The result is larger, and
                also holds where the bytes of a row do not grow with its tokens (sliding windows).

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
