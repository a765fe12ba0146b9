"""Convert a validated body to a generation request: tokenize it and check the server's limits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from rap_env.runtime.sampling import SamplingParams
from rap_env.serving.errors import ApiError, invalid, shown, unknown_model
from rap_env.serving.generation import GenerationRequest
from rap_env.serving.schemas import BaseCompletionRequest, ChatCompletionRequest, CompletionRequest
from rap_env.serving.settings import ServerSettings

DEFAULT_COMPLETION_TOKENS = 16
"""Most tokens of a plain completion that does not set a number, as in the OpenAI API."""
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""Roles of messages, and their names in chat templates."""
_UNSUPPORTED_MESSAGE_FIELDS = ("tool_calls", "function_call", "audio")


class RequestBuilder:
    """Makes generation requests from validated bodies.

    `context_tokens` is the most tokens of a prompt and its answer together, and `longest_prompt`
    gives the most tokens of a prompt that fit the memory budget, 0 if none do.
    """

    def __init__(
        self,
        tokenizer: Any,
        settings: ServerSettings,
        *,
        context_tokens: int,
        stop_token_ids: Sequence[int],
        longest_prompt: Callable[[], int],
    ) -> None:
        self._settings = settings
        self._context_tokens = context_tokens
        self._stop_token_ids = tuple(stop_token_ids)
        self._longest_prompt = longest_prompt
        self._tokenizer = tokenizer
        self._lock = threading.Lock()  # a tokenizer's settings are not thread-safe

    def build(self, body: ChatCompletionRequest | CompletionRequest) -> GenerationRequest:
        """Tokenize a body and check it against the limits. Long texts take a while.

        Raises:
            ApiError: The model is not the served one (404), or a limit is exceeded (400).
        """
        self.check_model(body.model)
        self._check_floor(body.max_delta_nll)
        stop_strings = self._stop_strings(body)
        most = self._settings.max_new_tokens
        if body.new_tokens is not None and body.new_tokens > most:
            raise invalid(
                f"max_tokens is too large: {body.new_tokens}. This server gives at most {most} "
                "tokens in an answer.",
                "max_tokens",
            )
        if isinstance(body, ChatCompletionRequest):
            prompts = [self.encode_chat(body.messages)]
        else:
            prompts = self._prompts(body.prompt)
        chat, n = isinstance(body, ChatCompletionRequest), body.n or 1
        if n * len(prompts) > self._settings.max_choices:
            raise invalid(
                f"This server gives at most {self._settings.max_choices} answers to one request, "
                f"and {n * len(prompts)} were asked for.",
                "n",
            )
        longest = max(map(len, prompts))
        self._check_prompt(longest, body)
        return GenerationRequest(
            prompts=prompts,
            params=self._sampling(body, self._max_new_tokens(body, longest)),
            n=n,
            stop_strings=stop_strings,
            # A number in a completion, 0 included; a flag in a chat.
            logprobs=bool(body.logprobs) if chat else body.logprobs is not None,
            chat=chat,
            stream=bool(body.stream),
            include_usage=bool(body.stream_options and body.stream_options.include_usage),
            max_delta_nll=body.max_delta_nll,
        )

    def check_model(self, name: str | None) -> None:
        """Raise an `ApiError` (404) unless a name is that of the served model, or not given."""
        if name not in (None, self._settings.served_name):
            raise unknown_model(name, self._settings.served_name)

    def _check_floor(self, max_delta_nll: float | None) -> None:
        strictest = self._settings.min_quality_per_request
        if max_delta_nll is None or (strictest is not None and max_delta_nll >= strictest):
            return
        allowed = "no floor of their own" if strictest is None else f"{strictest} or more"
        raise invalid(
            f"'max_delta_nll' must not be {max_delta_nll}: requests to this server may ask for "
            f"{allowed} (min_quality_per_request).",
            "max_delta_nll",
        )

    def _stop_strings(self, body: BaseCompletionRequest) -> list[str]:
        most, longest = self._settings.max_stop_strings, self._settings.max_stop_chars
        found = [body.stop] if isinstance(body.stop, str) else body.stop
        if found is None:
            return []
        if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
            raise invalid("'stop' must be a string or a list of strings.", "stop", "invalid_type")
        if not all(found):
            raise invalid("A stop string must not be empty.", "stop")
        if len(found) > most:
            raise invalid(f"'stop' may have at most {most} strings, not {len(found)}.", "stop")
        if any(len(text) > longest for text in found):
            raise invalid(f"A stop string may have at most {longest} characters.", "stop")
        return found

    def _check_prompt(self, tokens: int, body: BaseCompletionRequest) -> None:
        most = self._settings.max_prompt_tokens
        if most is not None and tokens > most:
            raise self._too_long(
                f"The prompt has {tokens} tokens; this server reads at most {most}.", body
            )
        if most is None and 0 < (fits := self._longest_prompt()) < tokens < self._context_tokens:
            raise self._too_long(
                f"The prompt has {tokens} tokens; at most {fits} fit the memory of this server.",
                body,
            )
        new = body.new_tokens or 1
        if tokens + new > self._context_tokens:
            raise self._too_long(
                f"This model's maximum context length is {self._context_tokens} tokens. However, "
                f"you requested {tokens + new} tokens ({tokens} in the prompt, {new} in the "
                "completion). Please reduce the length of the prompt or of the completion.",
                body,
            )

    @staticmethod
    def _too_long(message: str, body: BaseCompletionRequest) -> ApiError:
        field = "messages" if isinstance(body, ChatCompletionRequest) else "prompt"
        return invalid(message, field, "context_length_exceeded")

    def _max_new_tokens(self, body: BaseCompletionRequest, prompt_tokens: int) -> int:
        if body.new_tokens is not None:
            return body.new_tokens
        chat = isinstance(body, ChatCompletionRequest)
        default = self._settings.default_chat_tokens if chat else DEFAULT_COMPLETION_TOKENS
        most = min(default, self._settings.max_new_tokens)
        return max(1, min(most, self._context_tokens - prompt_tokens))

    def _sampling(self, body: BaseCompletionRequest, max_new_tokens: int) -> SamplingParams:
        temperature = 1.0 if body.temperature is None else body.temperature
        top_p = 1.0 if body.top_p is None else body.top_p
        if top_p == 0:  # an empty nucleus: take the most likely token
            temperature, top_p = 0.0, 1.0
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=max(0, body.top_k or 0),
            seed=body.seed,
            stop_token_ids=self._stop_token_ids,
        )

    def encode_text(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        with self._lock:
            return self._encode(text, add_special_tokens=add_special_tokens)

    def encode_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        add_special_tokens: bool = False,
    ) -> list[int]:
        """Token ids of messages in the model's chat template.

        The template writes the special tokens itself; `add_special_tokens` adds the tokenizer's.

        Raises:
            ApiError: There is no chat template, or it rejects the messages (400).
        """
        if not getattr(self._tokenizer, "chat_template", None):
            raise invalid(
                "This model has no chat template; use /v1/completions instead.",
                "messages",
                "no_chat_template",
            )
        if not messages:
            raise invalid("'messages' must have at least one message.", "messages")
        most = self._settings.max_messages
        if len(messages) > most:
            raise invalid(
                f"'messages' may have at most {most} messages, not {len(messages)}.", "messages"
            )
        turns = [_turn(number, message) for number, message in enumerate(messages)]
        try:
            with self._lock:
                text = self._tokenizer.apply_chat_template(
                    turns, tokenize=False, add_generation_prompt=add_generation_prompt
                )
                return self._encode(text, add_special_tokens=add_special_tokens)
        except ImportError:
            raise
        except Exception as error:  # a template is a program that may raise anything
            raise invalid(
                f"The model's chat template rejects these messages: {shown(str(error))}.",
                "messages",
            ) from None

    def _prompts(self, prompt: Any) -> list[list[int]]:
        if prompt is None:
            prompt = ""  # as in the API: from the start of a text
        if isinstance(prompt, str) or _is_ids(prompt):
            prompt = [prompt]
        if not isinstance(prompt, list) or not prompt:
            raise invalid(
                "'prompt' must be a string, a list of strings, a list of token ids, or a list of "
                "such lists.",
                "prompt",
                "invalid_type",
            )
        most = self._settings.max_choices
        if len(prompt) > most:
            raise invalid(f"'prompt' may have at most {most} entries, not {len(prompt)}.", "prompt")
        return [self._prompt(entry) for entry in prompt]

    def _prompt(self, entry: Any) -> list[int]:
        if isinstance(entry, str):
            ids = self.encode_text(entry)
        elif _is_ids(entry):
            ids = list(entry)
        else:
            raise invalid(
                f"An entry of 'prompt' must be a string or a list of token ids, "
                f"not {shown(repr(entry))}.",
                "prompt",
                "invalid_type",
            )
        start = getattr(self._tokenizer, "bos_token_id", None)
        if ids:
            return ids
        if start is None:
            raise invalid("The prompt has no tokens, and the model needs one.", "prompt")
        return [int(start)]  # an empty text still has its start token

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        ids: Sequence[int] = self._tokenizer.encode(
            text, add_special_tokens=add_special_tokens, verbose=False
        )
        return list(ids)


def _is_ids(value: Any) -> bool:
    """Whether it is a non-empty list of token ids."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(entry, int) and not isinstance(entry, bool) for entry in value)
    )


def _turn(number: int, message: dict[str, Any]) -> dict[str, str]:
    """One message as chat templates expect it: a known role, and text."""
    where = f"messages[{number}]"
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise invalid(
            f"Invalid value for '{where}.role': {shown(repr(role))}; supported are "
            f"{', '.join(map(repr, ROLES))}.",
            f"{where}.role",
        )
    for name in _UNSUPPORTED_MESSAGE_FIELDS:
        if message.get(name):
            raise invalid(f"'{where}.{name}' is not supported: messages are text.", where)
    return {"role": ROLES[role], "content": _content(message.get("content"), where)}


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content:
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
            for part in content
        ]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) == len(parts):
            return "".join(texts)
    raise invalid(
        f"'{where}.content' must be a string or a list of parts of type 'text'.",
        f"{where}.content",
        "invalid_type",
    )


def stop_tokens(llm: Any, tokenizer: Any) -> tuple[int, ...]:
    """Token ids that end an answer: those of the generation config and of the tokenizer."""
    config = getattr(llm.model, "generation_config", None)
    found = getattr(config, "eos_token_id", None)
    ids = set(found if isinstance(found, list | tuple) else [found])
    ids.add(getattr(tokenizer, "eos_token_id", None))
    return tuple(sorted(token for token in ids if token is not None))
