"""A request: what is to be served, and within which memory budget."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Protocol

from rap_env.errors import InvalidRequestError, ServingSettingsError

_UNITS = {
    **{"": 1, "B": 1, "KB": 1000},
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("kMGT", start=1)},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", start=1)},
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)")


class DensePeak(Protocol):
    """Byte arithmetic of a native model, such as `rap_env.MemoryModel`."""

    def native_peak_bytes(self, batch_size: int, seq_len_tokens: int) -> int:
        """Peak bytes of the unpruned model."""


@dataclass(frozen=True)
class Request:
    """A request: batch size, sequence length and memory budget.

    Attributes:
        batch_size: Number of sequences served together.
        seq_len_tokens: Tokens of each sequence, prompt and generated.
        budget_bytes: Bytes that the model, its KV cache and its workspace may use.

    Raises:
        InvalidRequestError: One of them is no whole number of at least 1.
    """

    batch_size: int
    seq_len_tokens: int
    budget_bytes: int

    def __post_init__(self) -> None:
        for name in ("batch_size", "seq_len_tokens", "budget_bytes"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:  # by far the rarest case
                object.__setattr__(self, name, whole_number(name, value, least=1))

    @classmethod
    def at_fraction(
        cls, memory: DensePeak, batch_size: int, seq_len_tokens: int, fraction: float
    ) -> Request:
        """A request whose budget is a fraction of the native model's peak bytes.

        Raises:
            InvalidRequestError: The fraction is not above 0, or the batch or length does
                not suit the model.
        """
        if not 0 < fraction < float("inf"):
            raise InvalidRequestError(f"The budget fraction must be above 0, not {fraction!r}.")
        native = memory.native_peak_bytes(batch_size, seq_len_tokens)
        return cls(batch_size, seq_len_tokens, max(1, int(fraction * native)))


def whole_number(name: str, value: Any, least: int | None = None) -> int:
    """Check that a value is a whole number and return it as an `int`.

    Args:
        name: What error messages call the value.
        value: Any integer, NumPy's included.
        least: Smallest allowed value; None allows all.

    Raises:
        InvalidRequestError: It is no whole number, or below `least`.
    """
    whole = not isinstance(value, bool) and hasattr(value, "__index__")
    if not whole or (least is not None and value < least):
        bound = "" if least is None else f" of at least {least}"
        raise InvalidRequestError(f"{name} must be a whole number{bound}, not {value!r}.")
    return int(value)


def human_bytes(count: float) -> str:
    """Bytes in binary units for display: ``"255.0 MiB"``."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:,.0f} B" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.2f} GiB"


def parse_bytes(name: str, text: str | int) -> int:
    """Convert ``"2.5GiB"``, ``"800 MB"`` or ``"1048576"`` to a number of bytes.

    Args:
        name: What error messages call the value.
        text: The text, or a number of bytes.

    Raises:
        ServingSettingsError: The text has another form.
    """
    match = _SIZE.fullmatch(str(text).strip())
    if match is None or match[2] not in _UNITS:
        raise ServingSettingsError(
            f"{name} must be a number of bytes such as 2.5GiB, 800MB or 1048576, not {text!r}; "
            "instead of 200M, write 200MB or 200MiB."
        )
    return int(float(match[1]) * _UNITS[match[2]])


def mebibytes(number: int) -> str:
    """A number of bytes, rounded up to whole MiB, as settings accept it."""
    return f"{-(-number // 2**20)}MiB"
