"""A request: what is to be served, and in how much memory."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Protocol

from rap_env.errors import InvalidRequestError


class DensePeak(Protocol):
    """Byte arithmetic of a dense model, such as `rap_env.MemoryModel`."""

    def dense_peak_bytes(self, batch_size: int, seq_len_tokens: int) -> int:
        """Peak bytes of the unpruned model."""


@dataclass(frozen=True)
class Request:
    """What is to be served, and in how much memory.

    Attributes:
        batch_size: Sequences served together.
        seq_len_tokens: Tokens of each sequence, prompt and generated ones.
        budget_bytes: Bytes that the model, its cache and its workspace may take.

    Raises:
        InvalidRequestError: One of them is no whole number of at least 1.
    """

    batch_size: int
    seq_len_tokens: int
    budget_bytes: int

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1:
                raise InvalidRequestError(
                    f"{entry.name} must be a whole number of at least 1, not {value!r}."
                )
            object.__setattr__(self, entry.name, int(value))

    @classmethod
    def at_fraction(
        cls, memory: DensePeak, batch_size: int, seq_len_tokens: int, fraction: float
    ) -> Request:
        """A request whose budget is a fraction of the dense model's peak bytes.

        Raises:
            InvalidRequestError: The fraction is not above 0, or the batch or length does
                not suit the model.
        """
        if not 0 < fraction < float("inf"):
            raise InvalidRequestError(f"The budget fraction must be above 0, not {fraction!r}.")
        dense = memory.dense_peak_bytes(batch_size, seq_len_tokens)
        return cls(batch_size, seq_len_tokens, max(1, int(fraction * dense)))


def whole(name: str, value: Any) -> int:
    """A whole number.

    Raises:
        InvalidRequestError: It is none.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise InvalidRequestError(f"{name} must be a whole number, not {value!r}.")
    return int(value)
