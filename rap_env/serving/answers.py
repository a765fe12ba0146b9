"""One answer on its way to a client: its text, its times, and the plans that computed it."""

from __future__ import annotations

import hashlib
import math
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rap_env.plan import Plan
from rap_env.runtime.request_handle import AdmitEvent, EndEvent, Event, TokenEvent
from rap_env.serving.metrics import ServingMetrics

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer writes for bytes that are not a whole character (yet)."""
_MAX_UNFINISHED = 3
"""Bytes of a UTF-8 character without its last one: so many may wait for it."""
_MAX_TOKENS = 64
"""Tokens after which bytes that never became a character are returned as they are."""


class Detokenizer:
    """Decodes a growing sequence of tokens; text that it has returned never changes.

    The text of a token depends on the tokens before it (a leading space is dropped at the
    start of a text) and, if a character has several bytes, on the tokens after it. So each
    step decodes a short window that begins with tokens whose text was already returned, and
    holds back text that may still change. The work per step does not grow with the sequence.

    Args:
        tokenizer: The model's tokenizer.
        kept_id: A special token that the text keeps.
    """

    def __init__(self, tokenizer: Any, kept_id: int | None = None) -> None:
        self._tokenizer = tokenizer
        self._kept_id = kept_id
        self._window: list[int] = []
        self._context = 0  # leading tokens of the window whose text was returned
        self._given = 0  # characters of the window's text that were returned

    def add(self, token_id: int) -> str:
        """Add a token and return the text that is final now, often that of the token alone."""
        if token_id == self._kept_id:
            piece: str = self.finish() + self._tokenizer.decode([token_id])
            self._window, self._context, self._given = [], 0, 0
            return piece
        self._window.append(token_id)
        text = plain_text(self._tokenizer, self._window)
        waiting = min(len(text) - len(text.rstrip(UNFINISHED)), _MAX_UNFINISHED)
        if len(self._window) - self._context > _MAX_TOKENS:
            waiting = 0
        certain = len(text) - waiting
        piece = text[self._given : certain]
        self._given = max(self._given, certain)
        if not waiting:
            self._move_on()
        return piece

    def finish(self) -> str:
        """Return the text that was held back; call it after the last token."""
        text = plain_text(self._tokenizer, self._window)
        piece = text[self._given :]
        self._given = len(text)
        return piece

    def _move_on(self) -> None:
        recent = self._window[self._context :]
        # A window without text would be no context.
        if text := plain_text(self._tokenizer, recent):
            self._window, self._given = recent, len(text)
        self._context = len(self._window)


def plain_text(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """Decode tokens, without special tokens and without cleaning up spaces."""
    text: str = tokenizer.decode(
        list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return text


class StopStrings:
    """Truncates streamed text before the first of several stop strings, none of them empty.

    After one has `matched`, no text is returned.
    """

    def __init__(self, strings: Sequence[str] = ()) -> None:
        self._strings = tuple(strings)
        self._waiting = ""
        self.matched = False

    def add(self, piece: str) -> str:
        """Add text and return the part that cannot belong to a stop string."""
        if self.matched:
            return ""
        text = self._waiting + piece
        starts = [start for start in map(text.find, self._strings) if start >= 0]
        if starts:
            self.matched = True
            self._waiting = ""
            return text[: min(starts)]
        keep = partial_match(text, self._strings)
        self._waiting = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """Return the text that was held back; call it after the last text."""
        text, self._waiting = self._waiting, ""
        return text


def partial_match(text: str, strings: Sequence[str]) -> int:
    """Length of the longest suffix of a text that is a prefix, not all, of one of some strings."""
    longest = min(len(text), max((len(string) - 1 for string in strings), default=0))
    for length in range(longest, 0, -1):
        if any(string.startswith(text[-length:]) for string in strings):
            return length
    return 0


class WrittenAnswers:
    """The text and token ids of recent chat answers, by the messages that clients got.

    A tokenizer may encode the text of an answer in other tokens than the model wrote, and a
    template may write tool calls in other words, so that what was kept of a conversation would
    not be found. Any thread may call it.

    Args:
        most_tokens: Most tokens of all answers, and one more for each; the oldest are
            forgotten.
    """

    def __init__(self, most_tokens: int = 2**16) -> None:
        self._most_tokens = most_tokens
        self._answers: dict[tuple[str, str], tuple[str, tuple[int, ...]]] = {}
        self._lock = threading.Lock()

    def add(self, owner: str, message: str, text: str, token_ids: Sequence[int]) -> None:
        """Remember an answer that a client of an owner got as a message."""
        with self._lock:
            self._answers.pop((owner, message), None)
            self._answers[owner, message] = text, tuple(token_ids)
            while sum(1 + len(ids) for _, ids in self._answers.values()) > self._most_tokens:
                del self._answers[next(iter(self._answers))]

    def get(self, owner: str, message: str) -> tuple[str, tuple[int, ...]] | None:
        """Text and token ids of an answer of an owner; None if it is not known."""
        return self._answers.get((owner, message))


def encode_parts(
    text: str,
    parts: Iterable[tuple[str, Sequence[int] | None]],
    encode: Callable[[str], list[int]],
    special_token: re.Pattern[str],
) -> list[int]:
    """Token ids of a text of which some parts have known ones.

    Args:
        text: The text of a chat.
        parts: What its messages say, in order, with the token ids where they are known; some
            may not be in the text as they are.
        encode: Gives the token ids of a text.
        special_token: Matches the texts of special tokens, within which no part begins or ends.
    """
    ids: list[int] = []
    inside = {
        place
        for match in special_token.finditer(text)
        for place in range(match.start() + 1, match.end())
    }
    done = at = 0
    for part, known in parts:
        begin = text.find(part, at)
        while begin >= 0 and not inside.isdisjoint((begin, begin + len(part))):
            begin = text.find(part, begin + 1)
        if begin < 0 or not part:
            continue
        at = begin + len(part)
        if known is not None:
            ids += [*encode(text[done:begin]), *known]
            done = at
    return [*ids, *encode(text[done:])]


class AnswerTimer:
    """Times of one answer in seconds since its arrival, from the engine's events.

    Args:
        metrics: Where the times are observed as they become known.
        prompt_tokens: Tokens of the prompt.
        arrived_s: Time of arrival on the engine's clock.
    """

    def __init__(self, metrics: ServingMetrics, prompt_tokens: int, arrived_s: float) -> None:
        self._metrics = metrics
        self._prompt_tokens = prompt_tokens
        self._arrived_s = self._last_s = arrived_s
        self._tokens = 0
        self.queue_s: float | None = None
        self.first_token_s: float | None = None

    def add(self, event: Event) -> None:
        """Take in an event; in their order."""
        seconds = max(0.0, event.time_s - self._arrived_s)
        if isinstance(event, TokenEvent):
            self._tokens += 1
            if self.first_token_s is None:
                self.first_token_s = seconds
                self._metrics.first_token_s.observe(seconds)
            else:
                self._metrics.between_tokens_s.observe(max(0.0, event.time_s - self._last_s))
            self._last_s = event.time_s
        elif isinstance(event, AdmitEvent | EndEvent):
            if self.queue_s is None:
                self.queue_s = seconds
                self._metrics.queue_s.observe(seconds)
            if isinstance(event, EndEvent):
                self._end(seconds)

    def _end(self, seconds: float) -> None:
        metrics = self._metrics
        metrics.answer_s.observe(seconds)
        metrics.prompt_tokens.observe(self._prompt_tokens)
        metrics.answer_tokens.observe(self._tokens)


class AnswerPlans:
    """The plans that computed the answers to one request, in the order of their passes.

    What is reported describes one of them, or of the plans under which tokens were read that
    were kept: the plan with the largest predicted rise in NLL. A plan without a prediction
    counts as larger than any other, and of equal ones the last is reported.

    Args:
        predict: Gives the rise in NLL of a plan in nats per token, None without a prediction.
        server: Names what else determines the answers, such as the model's weights.

    Attributes:
        fingerprint: The API's ``system_fingerprint``: equal for equal `server` and equal
            plans.
        changed: Whether the plan changed from one pass to the next.
        kept_levels: Tokens of the prompts that were kept of earlier requests, by the levels that
            their keys and values had.
        kept_file_tokens: Those of them that were in files.
    """

    def __init__(self, predict: Callable[[Plan], float | None], server: str) -> None:
        self._predict = predict
        self._digest = server
        self._last: Plan | None = None
        self._reported: Plan | None = None
        self._delta_nll: float | None = 0.0
        self.fingerprint = ""
        self.changed = False
        self.kept_levels = Counter[str]()
        self.kept_file_tokens = 0

    def add(self, plan: Plan) -> None:
        """Add the plan of the next pass."""
        if plan == self._last:
            return
        self.add_kept([plan])
        self.changed = self._last is not None
        self._last = plan
        self._digest = hashlib.sha256(f"{self._digest} {plan.digest}".encode()).hexdigest()
        self.fingerprint = f"fp_{self._digest[:10]}"

    def add_kept(self, plans: Iterable[Plan]) -> None:
        """Add the plans under which tokens were read that are kept; they are no passes."""
        for plan in plans:
            rise = self._predict(plan)
            if self._reported is None or _order(rise) >= _order(self._delta_nll):
                self._reported, self._delta_nll = plan, rise

    def report(self) -> dict[str, Any]:
        """The object ``rap`` of a response; ``delta_nll`` is in nats per token."""
        plan = self._reported or Plan()
        return {
            "plan": plan.digest,
            "levels": plan.summary,
            "delta_nll": self._delta_nll,
            "plan_changed": self.changed,
            "kept_tokens": self.kept_levels.total(),
            "kept_levels": self.kept_levels,
            "kept_file_tokens": self.kept_file_tokens,
        }


def _order(rise: float | None) -> float:
    return math.inf if rise is None else rise
