"""Load clients of a soak test: valid requests, disconnects, and invalid requests."""

from __future__ import annotations

import json
import random
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from experiments.config.serving import SoakConfig
from experiments.soak.recording import AnswerSample, SoakState
from rap_env.serving.detokenizer import plain_text

REJECTED = (429, 503)
"""Valid status codes when memory is short."""
REJECTED_CODES = (
    "insufficient_memory",
    "insufficient_quality",
    "service_unavailable",
    "rate_limit_exceeded",
)


@dataclass(frozen=True)
class Target:
    """The server under test."""

    url: str
    model: str
    token_ids: Sequence[int]
    tokenizer: Any
    sample: AnswerSample


class LoadClient:
    """Sends one request after another (closed loop), each of a kind drawn by seed and number."""

    def __init__(self, state: SoakState, target: Target, soak: SoakConfig, seed: int) -> None:
        self._state = state
        self._target = target
        self._soak = soak
        self._seed = seed
        self._random = random.Random()
        self._http = httpx.Client(base_url=target.url, timeout=soak.hang_s)

    def run(self) -> None:
        """Send requests until none is left."""
        with self._http:
            while (number := self._state.next_number()) is not None:
                self._random.seed(f"{self._seed} {number}")
                kind = self._kind()
                try:
                    outcome = getattr(self, f"_{kind}")()
                except Exception as error:
                    outcome = type(error).__name__
                    self._state.problem(f"Request {number} ({kind}) failed: {error!r}")
                self._state.finished(kind, outcome)

    def _kind(self) -> str:
        soak = self._soak
        kinds = ("cancel", "disconnect", "bad", "look", "good")
        shares = [soak.cancel_share, soak.disconnect_share, soak.bad_share, 0.03]
        shares.append(max(0.0, 1 - sum(shares)))
        return self._random.choices(kinds, shares)[0]

    # Request bodies

    def _prompt(self) -> list[int]:
        length = self._random.randint(1, self._soak.prompt_tokens)
        return [self._random.choice(self._target.token_ids) for _ in range(length)]

    def _body(self) -> tuple[str, dict[str, Any]]:
        draw = self._random
        body: dict[str, Any] = {
            "model": self._target.model,
            "max_tokens": draw.randint(1, self._soak.answer_tokens),
            "temperature": draw.choice([0, 0, 0.7, 1.3]),
            "stream": draw.random() < 0.5,
        }
        if draw.random() < 0.1:
            body["n"] = 2
        if draw.random() < 0.1:
            body["stop"] = [draw.choice("aeiou "), "\n\n"]
        if body["temperature"] and draw.random() < 0.5:
            body |= {"top_p": 0.9, "seed": draw.randrange(1000)}
        if self._target.tokenizer.chat_template and draw.random() < 0.2:
            text = plain_text(self._target.tokenizer, self._prompt())
            body["messages"] = [{"role": "user", "content": text}]
            return "/v1/chat/completions", body
        body["prompt"] = self._prompt()
        return "/v1/completions", body

    # Kinds of requests

    def _good(self) -> str:
        route, body = self._body()
        answer = self._streamed if body["stream"] else self._complete
        status, choices, usage = answer(route, body)
        if status != 200:
            if status not in REJECTED:
                self._state.problem(f"A valid request got status {status}: {choices}")
            return str(status)
        self._check(body, choices, usage)
        return "ok"

    def _complete(self, route: str, body: dict[str, Any]) -> tuple[int, Any, Any]:
        response = self._http.post(route, json=body)
        found = response.json()
        if response.status_code != 200:
            return response.status_code, found, None
        choices = [
            (choice.get("text", choice.get("message", {}).get("content")), choice["finish_reason"])
            for choice in found["choices"]
        ]
        return 200, choices, found["usage"]

    def _streamed(self, route: str, body: dict[str, Any]) -> tuple[int, Any, Any]:
        streaming = {**body, "stream_options": {"include_usage": True}}
        texts: dict[int, str] = {}
        reasons: dict[int, str] = {}
        usage, last = None, ""
        with self._http.stream("POST", route, json=streaming) as response:
            if response.status_code != 200:
                return response.status_code, response.read().decode(), None
            for line in response.iter_lines():
                if not line:
                    continue
                last = line.removeprefix("data: ")
                if last == "[DONE]":
                    continue
                event = json.loads(last)
                if "error" in event:
                    rejected = event["error"]["code"] in REJECTED_CODES
                    return (503 if rejected else 500), event, None
                usage = event["usage"] or usage
                for choice in event["choices"]:
                    piece = choice.get("text", choice.get("delta", {}).get("content")) or ""
                    texts[choice["index"]] = texts.get(choice["index"], "") + piece
                    reasons |= {choice["index"]: choice["finish_reason"]}
        if last != "[DONE]":
            return 500, "The stream ended without [DONE].", None
        return 200, [(texts[i], reasons[i]) for i in sorted(texts)], usage

    def _check(self, body: dict[str, Any], choices: Any, usage: Any) -> None:
        """Check that an answer fits its request and equals what the engine generated."""
        n = body.get("n", 1)
        right = (
            len(choices) == n
            and all(reason in ("stop", "length") for _, reason in choices)
            and 0 <= usage["completion_tokens"] <= n * body["max_tokens"]
            and usage["prompt_tokens"] == len(body.get("prompt", range(usage["prompt_tokens"])))
        )
        if not right:
            self._state.problem(f"The answer to {body} was {choices} with {usage}.")
        if "prompt" not in body or n > 1 or "stop" in body:
            return
        handle = self._target.sample.take(body["prompt"])
        if handle is None or handle.params.max_new_tokens != body["max_tokens"]:
            return  # of another request with the same prompt
        if choices[0][0] != plain_text(self._target.tokenizer, handle.token_ids):
            self._state.problem(f"The answer to {body} was {choices[0][0]!r}, not its tokens.")

    def _cancel(self) -> str:
        """Close a stream during generation."""
        route, body = self._body()
        body |= {"stream": True, "max_tokens": 2 * self._soak.answer_tokens}
        pieces = self._random.randrange(4)
        with self._http.stream("POST", route, json=body) as response:
            if response.status_code != 200:
                response.read()
                return str(response.status_code)
            for _, _line in zip(range(pieces), response.iter_lines(), strict=False):
                pass
        return "closed"

    def _disconnect(self) -> str:
        """Drop the connection: in the header, in the body, or while waiting for the answer."""
        route, body = self._body()
        content = json.dumps(body).encode()
        head = (
            f"POST {route} HTTP/1.1\r\nhost: soak\r\ncontent-type: application/json\r\n"
            f"content-length: {len(content)}\r\n\r\n"
        ).encode()
        message = head + content
        complete = self._random.random() < 0.6
        sent = message if complete else message[: self._random.randrange(len(message))]
        address = httpx.URL(self._target.url)
        with socket.create_connection((address.host, address.port or 80), timeout=30) as connection:
            connection.sendall(sent)
            if complete:
                time.sleep(self._random.random() * 0.3)
        return "after sending" if complete else "while sending"

    def _bad(self) -> str:
        """Send an invalid request, and check that it gets the expected status."""
        route, body = self._body()
        expected, content = self._random.choice(_INVALID)(self._random, body)
        headers = {"content-type": "application/json"}
        response = self._http.post(route, content=content, headers=headers)
        if response.status_code != expected or "error" not in response.json():
            self._state.problem(
                f"An invalid request ({content[:100]!r}) got status {response.status_code}, "
                f"not {expected}."
            )
        return str(response.status_code)

    def _look(self) -> str:
        """Get health, models or metrics."""
        path = self._random.choice(["/healthz", "/v1/models", "/metrics"])
        response = self._http.get(path)
        if response.status_code != 200:
            self._state.problem(f"{path} returned status {response.status_code}.")
        return str(response.status_code)


InvalidBody = Callable[[random.Random, dict[str, Any]], tuple[int, bytes]]


def _changed(status: int, **change: Any) -> InvalidBody:
    def invalid(_draw: random.Random, body: dict[str, Any]) -> tuple[int, bytes]:
        return status, json.dumps({**body, **change}).encode()

    return invalid


def _cut(draw: random.Random, body: dict[str, Any]) -> tuple[int, bytes]:
    content = json.dumps(body).encode()
    return 400, content[: draw.randrange(len(content))]


def _noise(draw: random.Random, _body: dict[str, Any]) -> tuple[int, bytes]:
    return 400, b"{" + draw.randbytes(draw.randint(1, 2000))


def _huge(draw: random.Random, body: dict[str, Any]) -> tuple[int, bytes]:
    return 413, json.dumps({**body, "user": "x" * draw.randint(300_000, 2_000_000)}).encode()


_INVALID: list[InvalidBody] = [
    _cut,
    _noise,
    _huge,
    _changed(404, model="another"),
    _changed(400, temperature="warm"),
    _changed(400, max_tokens=10**9),
    _changed(400, max_tokens=-1),
    _changed(400, n=10**6),
    _changed(400, stop=[["a"]]),
    _changed(400, prompt=[10**9], messages=[{"role": "nobody"}]),
    _changed(400, logit_bias={"1": 500}),
    _changed(400, nonsense=True),
    lambda _draw, _body: (400, b"[" * 5000),
]
