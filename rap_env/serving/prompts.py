"""Makes generation requests from validated bodies: tokenizes them and checks the limits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rap_env.importance.text_kinds import Shares, TextKinds
from rap_env.runtime.sampling import SamplingParams
from rap_env.runtime.structured_output import GrammarCompiler
from rap_env.serving.detokenizer import plain_text
from rap_env.serving.errors import ApiError, invalid, shown, unknown_model
from rap_env.serving.generation import GenerationRequest
from rap_env.serving.schemas import BaseCompletionRequest, ChatCompletionRequest, CompletionRequest
from rap_env.serving.settings import ServerSettings
from rap_env.serving.structured import constraint_of

Body = ChatCompletionRequest | CompletionRequest

DEFAULT_COMPLETION_TOKENS = 16
"""Most tokens of a plain completion that does not set a number, as in the OpenAI API."""
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""Roles of messages, and their names in chat templates."""
_UNSUPPORTED_FIELDS = ("tool_calls", "function_call", "audio")


class RequestBuilder:
    """Makes generation requests from validated bodies.

    `context_tokens` is the most tokens of a prompt and its answer together, `grammars` compiles
    what answers have to follow, `longest_prompt` gives the most tokens of a prompt that fit the
    memory budget, 0 if none do, and `text_kinds` tells the kinds of text in prompts, if the policy
    chooses by them.
    """

    def __init__(
        self,
        tokenizer: Any,
        settings: ServerSettings,
        *,
        context_tokens: int,
        grammars: GrammarCompiler,
        stop_token_ids: Sequence[int],
        longest_prompt: Callable[[], int],
        text_kinds: TextKinds | None = None,
    ) -> None:
        self._settings = settings
        self._context_tokens = context_tokens
        self._stop_token_ids = tuple(stop_token_ids)
        self._longest_prompt = longest_prompt
        self._text_kinds = text_kinds
        self._tokenizer = tokenizer
        self.grammars = grammars
        self._lock = threading.Lock()  # a tokenizer's settings are not thread-safe

    def build(self, body: Body) -> GenerationRequest:
        """Tokenize a body and check it against the limits. Long texts take a while.

        Raises:
            ApiError: The model is not the served one (404), or a limit is exceeded (400).
        """
        self.check_model(body.model)
        self._check_floor(body.max_delta_nll)
        stop_strings = self._stop_strings(body)
        self._check_new_tokens(body.new_tokens)
        echo: Sequence[str] = ()
        if isinstance(body, ChatCompletionRequest):
            prompts = [self.encode_chat(body.messages)]
        else:
            entries = self._entries(body.prompt)
            prompts = [self._prompt(entry) for entry in entries]
            if body.echo:
                echo = [
                    entry if isinstance(entry, str) else plain_text(self._tokenizer, prompt)
                    for entry, prompt in zip(entries, prompts, strict=True)
                ]
        chat, n = isinstance(body, ChatCompletionRequest), body.n or 1
        self._check_choices(n * len(prompts))
        longest = max(map(len, prompts))
        self._check_prompt(longest, body)
        return GenerationRequest(
            prompts=prompts,
            params=self._sampling(body, self._max_new_tokens(body, longest)),
            n=n,
            stop_strings=stop_strings,
            # A number in a completion, 0 included; a flag in a chat.
            logprobs=bool(body.logprobs) if chat else body.logprobs is not None,
            echo=echo,
            prompt_only=body.new_tokens == 0,
            chat=chat,
            stream=bool(body.stream),
            include_usage=bool(body.stream_options and body.stream_options.include_usage),
            max_delta_nll=body.max_delta_nll,
            text_shares=self._text_shares(body, prompts),
        )

    def _text_shares(self, body: Body, prompts: Sequence[Sequence[int]]) -> list[Shares]:
        """Kinds of text in each prompt; a chat counts without its template and system message."""
        if self._text_kinds is None:
            return []
        if isinstance(body, ChatCompletionRequest):
            turns = template_messages(body.messages)
            written = "\n".join(turn["content"] for turn in turns if turn["role"] != "system")
            prompts = [self.encode_text(written, add_special_tokens=False)]
        return [self._text_kinds.shares(prompt) for prompt in prompts]

    def check_model(self, name: str | None) -> None:
        """Raise an `ApiError` (404) unless a name is that of the served model, or not given."""
        if name not in (None, self._settings.served_name):
            raise unknown_model(name, self._settings.served_name)

    def _check_new_tokens(self, new_tokens: int | None) -> None:
        most = self._settings.max_new_tokens
        if new_tokens is not None and new_tokens > most:
            raise invalid(
                f"max_tokens is too large: {new_tokens}. This server gives at most {most} "
                "tokens in an answer.",
                "max_tokens",
            )

    def _check_choices(self, number: int) -> None:
        most = self._settings.max_choices
        if number > most:
            raise invalid(
                f"This server gives at most {most} answers to one request, "
                f"and {number} were asked for.",
                "n",
            )

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
        strings = [body.stop] if isinstance(body.stop, str) else body.stop
        if strings is None:
            return []
        if not isinstance(strings, list) or not all(isinstance(text, str) for text in strings):
            raise invalid("'stop' must be a string or a list of strings.", "stop", "invalid_type")
        if not all(strings):
            raise invalid("A stop string must not be empty.", "stop")
        if len(strings) > most:
            raise invalid(f"'stop' may have at most {most} strings, not {len(strings)}.", "stop")
        if any(len(text) > longest for text in strings):
            raise invalid(f"A stop string may have at most {longest} characters.", "stop")
        return strings

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
            return max(1, body.new_tokens)  # the engine generates at least one
        chat = isinstance(body, ChatCompletionRequest)
        default = self._settings.default_chat_tokens if chat else DEFAULT_COMPLETION_TOKENS
        most = min(default, self._settings.max_new_tokens)
        return max(1, min(most, self._context_tokens - prompt_tokens))

    def _sampling(self, body: Body, max_new_tokens: int) -> SamplingParams:
        temperature = 1.0 if body.temperature is None else body.temperature
        top_p = 1.0 if body.top_p is None else body.top_p
        if top_p == 0:  # an empty nucleus: take the most likely token
            temperature, top_p = 0.0, 1.0
        if isinstance(body, ChatCompletionRequest):
            top, echoed = body.top_logprobs or 0, False
        else:
            top, echoed = body.logprobs or 0, bool(body.echo) and body.logprobs is not None
        constraint = constraint_of(body, self.grammars)
        if body.ignore_eos and constraint is not None:
            raise invalid(
                "'ignore_eos' is not supported with structured output, which the end token ends.",
                "ignore_eos",
            )
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=max(0, body.top_k or 0),
            seed=body.seed,
            stop_token_ids=() if body.ignore_eos else self._stop_token_ids,
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            logit_bias=_bias(body.logit_bias or {}),
            top_logprobs=top,
            prompt_logprobs=top if echoed else None,
            constraint=constraint,
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
        turns = template_messages(messages)
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

    def _entries(self, prompt: Any) -> list[Any]:
        """The prompts of a plain completion, as they were given."""
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
        return prompt

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


def _bias(given: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    """Token ids and biases; the engine checks whether the model has the tokens."""
    for token in given:
        if not (token.isascii() and token.isdigit() and len(token) < 19):
            raise invalid(
                f"A key of 'logit_bias' must be a token id, not {shown(repr(token))}.", "logit_bias"
            )
    return tuple((int(token), bias) for token, bias in given.items())


def _is_ids(value: Any) -> bool:
    """Whether it is a non-empty list of token ids."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(entry, int) and not isinstance(entry, bool) for entry in value)
    )


def template_messages(messages: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Check messages and convert them: known roles and text.

    Raises:
        ApiError: A message is invalid (400).
    """
    return [_turn(f"messages[{number}]", message) for number, message in enumerate(messages)]


def _turn(where: str, message: dict[str, Any]) -> dict[str, str]:
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise invalid(
            f"Invalid value for '{where}.role': {shown(repr(role))}; supported are "
            f"{', '.join(map(repr, ROLES))}.",
            f"{where}.role",
        )
    for name in _UNSUPPORTED_FIELDS:
        if message.get(name):
            raise invalid(f"'{where}.{name}' is not supported in a message of '{role}'.", where)
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
    end = getattr(config, "eos_token_id", None)
    ids = set(end if isinstance(end, list | tuple) else [end])
    ids.add(getattr(tokenizer, "eos_token_id", None))
    return tuple(sorted(token for token in ids if token is not None))


def grammar_compiler(llm: Any, tokenizer: Any, vocab_size: int) -> GrammarCompiler:
    """Make what compiles the grammars of answers, for a model with its tokenizer."""
    stops = stop_tokens(llm, tokenizer)
    return GrammarCompiler(tokenizer, vocab_size=vocab_size, stop_token_ids=stops)
