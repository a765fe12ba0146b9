"""An open-loop client: sends requests at their times, and reads the streamed answers."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from experiments.replay.workload import ReplayRequest

MODEL_NAME = "served"
"""Name under which every server offers its model."""

OUTCOMES = ("served", "refused", "timed_out", "failed")
"""Outcomes of a request: its stream ended as it should; the server rejected it; the client's
timeout; the stream or the connection broke."""

REJECTED_CODES = ("insufficient_memory", "insufficient_quality", "rate_limit_exceeded")
"""Codes of valid answers when memory is short."""

_REJECTIONS = (400, 413, 429, 503)
"""Status codes of a request that the server does not accept, now or at all."""


@dataclass
class Answer:
    """What became of one request.

    Attributes:
        outcome: One of `OUTCOMES`.
        text: The generated text.
        tokens: Number of generated tokens, as the server counts them.
        first_s: Seconds from the arrival to the first piece of the stream.
        last_s: Seconds from the arrival to the last piece.
        reason: Status code or error of a request that was not served.
    """

    request: ReplayRequest
    outcome: str = "failed"
    text: str = ""
    tokens: int = 0
    first_s: float | None = None
    last_s: float | None = None
    reason: str = ""

    @property
    def tpot_s(self) -> float | None:
        """Seconds per token after the first; None with fewer than two tokens."""
        if self.first_s is None or self.last_s is None or self.tokens < 2:
            return None
        return (self.last_s - self.first_s) / (self.tokens - 1)


@dataclass(frozen=True)
class Client:
    """Sends requests to ``/v1/completions`` of a server.

    Attributes:
        url: The server's address.
        timeout_s: Seconds from the arrival after which the client gives up.
        banned_ids: Tokens that no answer may have, such as the end of a sequence; answers then
            have as many tokens as were asked for.
    """

    url: str
    timeout_s: float
    banned_ids: Sequence[int] = field(default=())

    def play(self, requests: Sequence[ReplayRequest]) -> list[Answer]:
        """Send each request at its time, counted from now, and wait for all answers."""
        return asyncio.run(self._play(requests))

    async def _play(self, requests: Sequence[ReplayRequest]) -> list[Answer]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self.url, timeout=None, limits=limits) as http:
            start_s = time.monotonic()
            return await asyncio.gather(*(self._send(http, start_s, r) for r in requests))

    async def _send(
        self, http: httpx.AsyncClient, start_s: float, request: ReplayRequest
    ) -> Answer:
        answer, arrived_s = Answer(request), start_s + request.time_s
        await asyncio.sleep(max(0.0, arrived_s - time.monotonic()))
        try:
            async with asyncio.timeout(self.timeout_s):
                await self._read(http, answer, arrived_s)
        except TimeoutError:
            answer.outcome, answer.reason = "timed_out", "timeout of the client"
        except httpx.HTTPError as error:
            answer.outcome, answer.reason = "failed", type(error).__name__
        return answer

    async def _read(self, http: httpx.AsyncClient, answer: Answer, arrived_s: float) -> None:
        async with http.stream("POST", "/v1/completions", json=self._body(answer)) as response:
            if response.status_code != 200:
                await response.aread()
                rejected = response.status_code in _REJECTIONS
                answer.outcome = "refused" if rejected else "failed"
                answer.reason = str(response.status_code)
                return
            async for line in response.aiter_lines():
                kind, _, data = line.partition(": ")
                if kind not in ("data", "error") or data == "[DONE]":
                    continue
                event = json.loads(data)
                if kind == "error" or "error" in event:
                    code = event.get("error", event).get("code")
                    rejected = code in (*REJECTED_CODES, *_REJECTIONS) and not answer.text
                    answer.outcome = "refused" if rejected else "failed"
                    answer.reason = str(code)
                    return
                _take(answer, event, time.monotonic() - arrived_s)

    def _body(self, answer: Answer) -> dict[str, Any]:
        return {
            "model": MODEL_NAME,
            "prompt": list(answer.request.prompt_ids),
            "max_tokens": answer.request.new_tokens,
            "temperature": 0,
            "logit_bias": {str(token): -100 for token in self.banned_ids},
            "stream": True,
            "stream_options": {"include_usage": True},
        }


def _take(answer: Answer, event: dict[str, Any], now_s: float) -> None:
    """Take in one piece of a stream."""
    if usage := event.get("usage"):
        answer.tokens = int(usage["completion_tokens"])
    for choice in event.get("choices", ()):
        if choice.get("text"):
            answer.text += choice["text"]
            answer.first_s = now_s if answer.first_s is None else answer.first_s
            answer.last_s = now_s
        if choice.get("finish_reason"):
            answer.outcome = "served"
