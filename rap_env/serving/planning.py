"""From a checked request to what the engine is asked to do, within the server's limits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rap_env.runtime.sampling import SamplingParams
from rap_env.serving.errors import ApiError, invalid, unknown_model
from rap_env.serving.generation import Plan
from rap_env.serving.prompts import PromptReader
from rap_env.serving.schemas import ChatRequest, CompletionRequest
from rap_env.serving.settings import ServingSettings

DEFAULT_COMPLETION_TOKENS = 16
"""Tokens of a plain completion that does not ask for a number, as in the API."""


class Planner:
    """Makes plans of requests.

    Args:
        tokenizer: The model's tokenizer.
        settings: The server's limits.
        context_tokens: Most tokens of a prompt and its answer together.
        stop_token_ids: Tokens that end an answer.
    """

    def __init__(
        self,
        tokenizer: Any,
        settings: ServingSettings,
        *,
        context_tokens: int,
        stop_token_ids: Sequence[int],
    ) -> None:
        self._settings = settings
        self._context_tokens = context_tokens
        self._stop_token_ids = tuple(stop_token_ids)
        self._reader = PromptReader(
            tokenizer, max_messages=settings.max_messages, max_prompts=settings.max_choices
        )

    def plan(self, asked: ChatRequest | CompletionRequest) -> Plan:
        """What the engine is to do. Tokenises, which takes its time with long texts.

        Raises:
            ApiError: The model is another (404), or a limit is passed (400).
        """
        if asked.model != self._settings.model_name:
            raise unknown_model(asked.model, self._settings.model_name)
        self._check_stops(asked.stops)
        self._check_asked_tokens(asked)
        prompts = self._reader.read(asked)
        n = asked.n or 1
        if n * len(prompts) > self._settings.max_choices:
            raise invalid(
                f"This server gives at most {self._settings.max_choices} answers to one request, "
                f"and {n * len(prompts)} were asked for.",
                "n",
            )
        longest = max(map(len, prompts))
        self._check_prompt(longest, asked)
        return Plan(
            prompts=prompts,
            params=self._sampling(asked, self._new_tokens(asked, longest)),
            n=n,
            stops=asked.stops,
            logprobs=asked.wants_logprobs,
        )

    def _check_stops(self, stops: Sequence[str]) -> None:
        most, longest = self._settings.max_stop_strings, self._settings.max_stop_chars
        if len(stops) > most:
            raise invalid(f"'stop' may have at most {most} strings, not {len(stops)}.", "stop")
        if any(len(text) > longest for text in stops):
            raise invalid(f"A stop string may have at most {longest} characters.", "stop")

    def _check_asked_tokens(self, asked: ChatRequest | CompletionRequest) -> None:
        most = self._settings.max_new_tokens
        if asked.new_tokens is not None and asked.new_tokens > most:
            raise invalid(
                f"max_tokens is too large: {asked.new_tokens}. This server gives at most {most} "
                "tokens in an answer.",
                "max_tokens",
            )

    def _check_prompt(self, tokens: int, asked: ChatRequest | CompletionRequest) -> None:
        most = self._settings.max_prompt_tokens
        if most is not None and tokens > most:
            raise invalid(
                f"The prompt has {tokens} tokens; this server reads at most {most}.",
                _prompt_field(asked),
                "context_length_exceeded",
            )
        if tokens + (asked.new_tokens or 1) > self._context_tokens:
            raise self._too_long(tokens, asked)

    def _too_long(self, tokens: int, asked: ChatRequest | CompletionRequest) -> ApiError:
        new = asked.new_tokens or 1
        return invalid(
            f"This model's maximum context length is {self._context_tokens} tokens. However, you "
            f"requested {tokens + new} tokens ({tokens} in the prompt, {new} in the completion). "
            "Please reduce the length of the prompt or of the completion.",
            _prompt_field(asked),
            "context_length_exceeded",
        )

    def _new_tokens(self, asked: ChatRequest | CompletionRequest, prompt_tokens: int) -> int:
        if asked.new_tokens is not None:
            return asked.new_tokens
        chat = isinstance(asked, ChatRequest)
        default = self._settings.default_chat_tokens if chat else DEFAULT_COMPLETION_TOKENS
        most = min(default, self._settings.max_new_tokens)
        return max(1, min(most, self._context_tokens - prompt_tokens))

    def _sampling(
        self, asked: ChatRequest | CompletionRequest, max_new_tokens: int
    ) -> SamplingParams:
        temperature = 1.0 if asked.temperature is None else asked.temperature
        top_p = 1.0 if asked.top_p is None else asked.top_p
        if top_p == 0:  # no share of the probability: the likeliest token alone
            temperature, top_p = 0.0, 1.0
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=max(0, asked.top_k or 0),
            seed=asked.seed,
            stop_token_ids=self._stop_token_ids,
        )


def _prompt_field(asked: ChatRequest | CompletionRequest) -> str:
    return "messages" if isinstance(asked, ChatRequest) else "prompt"


def stop_tokens(llm: Any, tokenizer: Any) -> tuple[int, ...]:
    """Token ids that end an answer: those of the generation config and of the tokenizer."""
    config = getattr(llm.model, "generation_config", None)
    found = getattr(config, "eos_token_id", None)
    ids = set(found if isinstance(found, list | tuple) else [found])
    ids.add(getattr(tokenizer, "eos_token_id", None))
    return tuple(sorted(token for token in ids if token is not None))
