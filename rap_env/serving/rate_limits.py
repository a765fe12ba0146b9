"""Limits of requests and tokens per minute, one set for each API key."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from rap_env.serving.errors import ApiError

_MINUTE_S = 60.0


@dataclass(frozen=True)
class KeyLimits:
    """Limits of one key; None for none.

    Attributes:
        requests: Completion requests per minute.
        tokens: Tokens of prompts and answers per minute.
    """

    requests: int | None = None
    tokens: int | None = None


class _Bucket:
    """A token bucket: holds a minute's worth, and is refilled at that rate.

    A take of more than it can ever hold needs a full bucket, and leaves a debt.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self._capacity = float(per_minute)
        self._clock = clock
        self._level = self._capacity
        self._filled_s = clock()

    def missing_s(self, amount: float) -> float:
        """Seconds until an amount can be taken; 0 if it can be now."""
        now_s = self._clock()
        refill = (now_s - self._filled_s) * self._capacity / _MINUTE_S
        self._level, self._filled_s = min(self._capacity, self._level + refill), now_s
        missing = min(amount, self._capacity) - self._level
        return max(0.0, missing) * _MINUTE_S / self._capacity

    def take(self, amount: float) -> None:
        self._level -= amount

    def put_back(self, amount: float) -> None:
        self._level = min(self._capacity, self._level + amount)


class Allowance:
    """What one key may still use; for one thread.

    Args:
        limits: The key's limits.
        clock: Gives the time in seconds.
    """

    def __init__(self, limits: KeyLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits
        requests, tokens = limits.requests, limits.tokens
        self._requests = None if requests is None else _Bucket(requests, clock)
        self._tokens = None if tokens is None else _Bucket(tokens, clock)

    def charge(self, most_tokens: int) -> Charge:
        """Take a request and the most tokens that it may use; settle the charge when it ends.

        Raises:
            ApiError: Status 429: the key has used up a limit; nothing is taken.
        """
        for kind, bucket, amount, limit in (
            ("requests", self._requests, 1, self.limits.requests),
            ("tokens", self._tokens, most_tokens, self.limits.tokens),
        ):
            if bucket is not None and (wait_s := bucket.missing_s(amount)) > 0:
                raise _exceeded(kind, limit, amount, math.ceil(wait_s))
        if self._requests is not None:
            self._requests.take(1)
        if self._tokens is not None:
            self._tokens.take(most_tokens)
        return Charge(self._tokens, most_tokens)


class Charge:
    """Tokens that were taken for a request in advance."""

    def __init__(self, bucket: _Bucket | None, tokens: int) -> None:
        self._bucket = bucket
        self._tokens = tokens

    def settle(self, used_tokens: int) -> None:
        """Give back what was not used."""
        if self._bucket is not None:
            self._bucket.put_back(self._tokens - used_tokens)


def _exceeded(kind: str, limit: int | None, amount: int, wait_s: int) -> ApiError:
    asked = f" This one may use {amount:,} (prompt and longest answer)." if kind == "tokens" else ""
    return ApiError(
        429,
        f"Your API key may use {limit:,} {kind} per minute, and has used them up.{asked} Ask again "
        f"in {wait_s} s.",
        kind=kind,
        code="rate_limit_exceeded",
        headers={"retry-after": str(wait_s)},
    )
