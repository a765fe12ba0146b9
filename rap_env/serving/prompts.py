"""Makes generation requests from validated bodies: tokenizes them and checks the limits."""

from __future__ import annotations

import inspect
import json
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from rap_env.errors import InvalidGrammarError, MissingDependencyError, UnsupportedModelError
from rap_env.models.files.gguf_source import MODELS
from rap_env.runtime.request_handle import EXPECTED_TOKENS
from rap_env.runtime.sampling import SamplingParams
from rap_env.runtime.structured_output import (
    GrammarCompiler,
    GrammarKind,
    GrammarMatcher,
    closed_schema,
)
from rap_env.serving.http import ApiError, invalid, shown
from rap_env.serving.schemas import (
    BaseCompletionRequest,
    ChatCompletionRequest,
    ChatMessage,
    CompletionRequest,
    answer_grammar,
    other_fields,
)
from rap_env.serving.settings import ServerSettings
from rap_env.serving.tool_calls import GENERIC_FORM, CallForm, ToolCallParser, generic_turns

if TYPE_CHECKING:
    from rap_env.runtime.engine import Engine

Body = ChatCompletionRequest | CompletionRequest

_TURN_FIELDS = {"role", "content", "tool_calls", "tool_call_id"}
MILD_SAMPLING: Mapping[str, float] = {"temperature": 0.8, "top_k": 40, "top_p": 0.95}
"""How answers are sampled where neither the request nor the model says, as in llama.cpp."""
_SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
MOST_ANSWERS = 8
"""Most answers to one request: prompts times n."""
DEFAULT_CHAT_TOKENS = 256
"""Most tokens of a chat answer whose request sets no number."""
DEFAULT_COMPLETION_TOKENS = 16
"""Most tokens of a plain completion that does not set a number, as in the OpenAI API."""


@dataclass(frozen=True)
class GenerationRequest:
    """Generation settings and response format of one HTTP request.

    Attributes:
        prompts: Token ids of each prompt.
        n: Number of answers to each prompt.
        echo: Text of each prompt, which the answers begin with; empty for no such texts.
        include_usage: Whether a stream ends with the numbers of tokens.
        ignored: What was asked for and has no effect: fields, and keywords of schemas.
        owner: Whose kept sequences may be used for it: those of its key and its salt.
        call_parser: Makes what finds the tool calls of an answer; None if it may not call.
        written: Called with content and tool calls of each answer that ended by itself, the text
            as it was generated, and its token ids.
    """

    prompts: Sequence[Sequence[int]]
    params: SamplingParams
    n: int = 1
    stop_strings: Sequence[str] = ()
    echo: Sequence[str] = ()
    chat: bool = False
    stream: bool = False
    include_usage: bool = False
    ignored: Sequence[str] = ()
    owner: str = ""
    call_parser: Callable[[], ToolCallParser] | None = None
    written: Callable[[str, Sequence[Any], str, Sequence[int]], None] | None = None

    @property
    def size(self) -> int:
        """Number of answers."""
        return len(self.prompts) * self.n

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts, each counted once."""
        return sum(map(len, self.prompts))

    @property
    def final_tokens(self) -> int:
        """Most tokens that the cache of one of its answers will hold."""
        expected = min(EXPECTED_TOKENS, self.params.max_new_tokens)
        return max(map(len, self.prompts)) + expected - 1

    def params_of(self, number: int) -> SamplingParams:
        """Sampling parameters of answer `number`; with a seed, each answer has its own seed."""
        if self.params.seed is None:
            return self.params
        return replace(self.params, seed=(self.params.seed + number) % 2**63)


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


class RequestBuilder:
    """Makes generation requests from validated bodies.

    `grammars` compiles what answers have to follow.

    Attributes:
        context_tokens: Most tokens of a prompt and its answer together.
        answers: Chat answers of this server.
        sampling: The sampling of requests that do not say.
    """

    def __init__(
        self, engine: Engine, tokenizer: Any, settings: ServerSettings, grammars: GrammarCompiler
    ) -> None:
        self._settings = settings
        self._model = settings.served_name
        self.sampling = default_sampling(engine.llm, settings.model)
        self._stop_token_ids = stop_tokens(engine.llm, tokenizer)
        self._tokenizer = tokenizer
        self.context_tokens = engine.max_seq_len_tokens
        self.grammars = grammars
        self.answers = WrittenAnswers()
        self._keeps = settings.keep == "on"
        self._special_token = re.compile("|".join(map(re.escape, tokenizer.all_special_tokens)))
        self._lock = threading.Lock()  # a tokenizer's settings are not thread-safe

    def build(self, body: Body, key: str = "") -> GenerationRequest:
        """Tokenize a body of a client and check it against the limits. Long texts take a while.

        Raises:
            ApiError: The model is not the served one (404), or a limit is exceeded (400).
        """
        owner = f"{key} {body.cache_salt or ''}"
        self.check_model(body.model)
        chat, n = isinstance(body, ChatCompletionRequest), body.n or 1
        self._check_choices(n, 1 if isinstance(body, ChatCompletionRequest) else len(body.prompt))
        call_parser, echo = None, list[str]()
        if isinstance(body, ChatCompletionRequest):
            prompts = [self.encode_chat(body, owner)]
            if body.offered_tools:
                names = [tool.function.name for tool in body.offered_tools]
                single = body.parallel_tool_calls is False
                call_parser = partial(ToolCallParser, self.form_for(body), names, single=single)
        else:
            prompts = [self._prompt(entry) for entry in body.prompt]
            if body.echo:
                echo = [
                    entry if isinstance(entry, str) else plain_text(self._tokenizer, prompt)
                    for entry, prompt in zip(body.prompt, prompts, strict=True)
                ]
        ignored = other_fields(body)
        new_tokens = self._max_new_tokens(body, max(map(len, prompts)))
        return GenerationRequest(
            prompts=prompts,
            params=self._sampling(body, new_tokens, ignored),
            n=n,
            stop_strings=body.stop or (),
            echo=echo,
            chat=chat,
            stream=bool(body.stream),
            include_usage=bool(body.stream_options and body.stream_options.include_usage),
            ignored=ignored,
            call_parser=call_parser,
            owner=owner,
            written=partial(self._note_written, owner) if chat and self._keeps else None,
        )

    def _note_written(
        self, owner: str, content: str, calls: Sequence[Any], text: str, token_ids: Sequence[int]
    ) -> None:
        given = {"role": "assistant", "content": content, "tool_calls": list(calls) or None}
        message = ChatMessage.model_validate(given)
        self.answers.add(owner, _answer_key(message), text, token_ids)

    def check_model(self, name: str | None) -> None:
        """Raise an `ApiError` (404) if the server is strict and a name is not its model's."""
        if self._settings.strict and name != self._model:
            raise ApiError(
                404,
                f"The model `{shown(name)}` does not exist or you do not have access to it; "
                f"this server has `{self._model}`.",
                param="model",
                code="model_not_found",
            )

    def _check_choices(self, n: int, prompts: int) -> None:
        if n * prompts > MOST_ANSWERS:
            raise invalid(
                f"This server gives at most {MOST_ANSWERS} answers to one request, "
                f"and {n * prompts} were asked for.",
                "prompt" if n == 1 else "n",
            )

    def _max_new_tokens(self, body: BaseCompletionRequest, prompt_tokens: int) -> int:
        """Most tokens of an answer: what was asked for, as far as context and server allow."""
        chat = isinstance(body, ChatCompletionRequest)
        default = DEFAULT_CHAT_TOKENS if chat else DEFAULT_COMPLETION_TOKENS
        left = self.context_tokens - prompt_tokens
        if left < 1:
            raise invalid(
                f"This model's maximum context length is {self.context_tokens} tokens. However, "
                f"the prompt has {prompt_tokens}. Please reduce the length of the prompt.",
                "messages" if chat else "prompt",
                "context_length_exceeded",
            )
        asked = default if body.new_tokens is None else body.new_tokens
        if asked == 0:
            raise invalid("max_tokens must be at least 1, or -1 for any number.", "max_tokens")
        most = min(left, self._settings.max_new_tokens or left)
        return most if asked < 0 else min(asked, most)

    def _sampling(self, body: Body, max_new_tokens: int, ignored: list[str]) -> SamplingParams:
        asked = {name: getattr(body, name) for name in _SAMPLING_FIELDS}
        asked = {name: value for name, value in asked.items() if value is not None}
        sampling: dict[str, Any] = {**self.sampling, **asked}
        if sampling.get("top_p") == 0:  # an empty nucleus: take the most likely token
            sampling |= {"temperature": 0.0, "top_p": 1.0}
        if isinstance(body, ChatCompletionRequest):
            top_logprobs = (body.top_logprobs or 0) if body.logprobs else None
            prompt_logprobs = False
        else:
            top_logprobs = body.logprobs
            prompt_logprobs = bool(body.echo) and top_logprobs is not None
        return SamplingParams(
            **sampling | {"top_k": max(0, sampling.get("top_k", 0))},
            max_new_tokens=max_new_tokens,
            seed=body.seed,
            stop_token_ids=(*self._stop_token_ids, *(body.stop_token_ids or ())),
            min_tokens=max_new_tokens if body.ignore_eos else body.min_tokens or 0,
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            logit_bias=_bias(body.logit_bias or {}),
            top_logprobs=top_logprobs,
            prompt_logprobs=prompt_logprobs,
            max_delta_nll=body.max_delta_nll,
            constraint=self._constraint(body, ignored),
        )

    def _constraint(self, body: Body, ignored: list[str]) -> Callable[[], GrammarMatcher] | None:
        """Compile what the answers have to follow; errors are `ApiError` (400).

        What is left out of schemas is added to `ignored`.
        """
        answer, constraint = answer_grammar(body), None
        grammars: list[tuple[str, GrammarKind, Any] | None] = [answer]
        if isinstance(body, ChatCompletionRequest) and body.offered_tools:
            if answer is not None and answer[1] != "json_schema":
                raise invalid(f"Beside 'tools', '{answer[0]}' can only be a schema.", answer[0])
            grammars.append(self._tool_grammar(body, None if answer is None else answer[2]))
        for field, kind, content in filter(None, grammars):
            notes: list[str] = []
            try:
                if kind == "json_schema":
                    content = closed_schema(content)
                text = content if isinstance(content, str) else json.dumps(content)
                strict = self._settings.strict
                constraint = self.grammars.compile(kind, text, None if strict else notes)
                ignored += [f"{field}: {note}" for note in notes]
            except (InvalidGrammarError, RecursionError) as error:
                message = f"Invalid value for '{field}': {shown(str(error), 400)}"
                raise invalid(message, field) from None
            except (MissingDependencyError, UnsupportedModelError) as error:
                raise _unsupported(field, error) from None
        return constraint

    def _tool_grammar(
        self, body: ChatCompletionRequest, answer: dict[str, Any] | None
    ) -> tuple[str, GrammarKind, str] | None:
        """The grammar of calls that must follow their schemas; None if no call must.

        Args:
            body: The request.
            answer: The JSON schema of an answer without calls, if it has one.
        """
        chosen, required = body.chosen_function, body.must_call
        functions = [tool.function for tool in body.offered_tools]
        strict = any(function.strict for function in functions)
        if not required and not strict and answer is None:
            return None
        schemas = {f.name: f.parameters for f in functions if chosen in (None, f.name)}
        single = chosen is not None or body.parallel_tool_calls is False
        grammar = self.form_for(body).grammar(
            schemas,
            required=required,
            single=single,
            answer=answer,
            lenient=not self._settings.strict,
        )
        return "tools", "grammar", grammar

    @cached_property
    def _own_form(self) -> CallForm | UnsupportedModelError:
        """How the model's chat template writes calls, or why it does not."""
        try:
            return CallForm.of_template(self._render, self._tokenizer)
        except UnsupportedModelError as error:
            return error

    def form_for(self, body: ChatCompletionRequest) -> CallForm:
        """How the model calls tools in the answers to a request.

        A model whose chat template has no place for tools, or an unknown form of calls, writes
        them as `GENERIC_FORM`, which takes a grammar.

        Raises:
            ApiError: It is such a model, and may answer without a call (400).
        """
        form = self._own_form
        if isinstance(form, CallForm):
            return form
        if body.offered_tools and not body.must_call:
            raise _unsupported("tools", form)
        return GENERIC_FORM

    def encode_chat(self, body: ChatCompletionRequest, owner: str) -> list[int]:
        """Token ids of messages in the model's chat template, which writes the special tokens.

        Answers that this server gave to an owner have the tokens in which they were written.

        Raises:
            ApiError: There is no chat template, it rejects the messages, or it does not know the
                tools that are offered (400).
        """
        messages, tools = body.messages, body.offered_tools
        if not self._tokenizer.chat_template:
            raise invalid(
                "This model has no chat template; use /v1/completions instead.",
                "messages",
                "no_chat_template",
            )
        uses_tools = tools or any(m.tool_calls or m.role == "tool" for m in messages)
        generic = uses_tools and self.form_for(body) is GENERIC_FORM
        turns = template_turns(messages)
        offered = [tool.model_dump(exclude={"function": {"strict"}}) for tool in tools]
        if generic:
            turns, offered = generic_turns(turns, offered), []
        variables = body.chat_template_kwargs or {}
        options = inspect.signature(self._tokenizer.apply_chat_template).parameters
        if names := sorted(options.keys() & variables.keys()):  # a template of the client's own
            raise invalid(
                f"'chat_template_kwargs' has variables of the template, not {', '.join(names)}.",
                "chat_template_kwargs",
            )
        render: Callable[..., str] = partial(self._render, tools=offered, **variables)
        encode = partial(self.encode, add_special=False)
        if generic:
            return encode(render(turns))
        parts = self._parts(messages, owner)
        written = list(turns)
        for place, (message, (text, known)) in enumerate(zip(messages, parts, strict=True)):
            if known and message.tool_calls:
                written[place] = {"role": "assistant", "content": text}
        try:
            text = render(written)
        except ApiError:
            text = render(turns)  # some templates take no results without calls
        return encode_parts(text, parts, encode, self._special_token)

    def _parts(
        self, messages: Sequence[ChatMessage], owner: str
    ) -> list[tuple[str, Sequence[int] | None]]:
        """The text of each message, and the token ids of those that are answers to an owner."""
        parts = list[tuple[str, Sequence[int] | None]]()
        for message in messages:
            answer = None
            if message.role == "assistant":
                answer = self.answers.get(owner, _answer_key(message))
            parts.append(answer or (message.content, None))
        return parts

    def _render(
        self, turns: list[dict[str, Any]], tools: list[dict[str, Any]], **variables: Any
    ) -> str:
        with self._lock:
            return in_template(self._tokenizer, turns, tools, **variables)

    def _prompt(self, entry: str | list[int]) -> list[int]:
        ids = self.encode(entry, add_special=True) if isinstance(entry, str) else entry
        start = self._tokenizer.bos_token_id
        if ids:
            return ids
        if start is None:
            raise invalid("The prompt has no tokens, and the model needs one.", "prompt")
        return [int(start)]  # an empty text still has its start token

    def encode(self, text: str, add_special: bool) -> list[int]:
        """Token ids of a text; from any thread."""
        with self._lock:
            ids: Sequence[int] = self._tokenizer.encode(
                text, add_special_tokens=add_special, verbose=False
            )
        return list(ids)


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


def plain_text(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """Decode tokens, without special tokens and without cleaning up spaces."""
    text: str = tokenizer.decode(
        list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return text


def _bias(given: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    """Token ids and biases; the engine checks whether the model has the tokens."""
    for token in given:
        if not (token.isascii() and token.isdigit() and len(token) < 19):
            raise invalid(
                f"A key of 'logit_bias' must be a token id, not {shown(repr(token))}.", "logit_bias"
            )
    return tuple((int(token), bias) for token, bias in given.items())


def _unsupported(field: str, error: Exception) -> ApiError:
    message = f"'{field}' is not supported with this server: {shown(str(error), 400)}"
    return invalid(message, field, "unsupported_parameter")


def in_template(
    tokenizer: Any, turns: list[dict[str, Any]], tools: list[dict[str, Any]], **variables: Any
) -> str:
    """The text of turns in a model's chat template, up to where an answer begins.

    Raises:
        ApiError: The template rejects them (400).
    """
    fixed = {"tools": tools or None, "tokenize": False, "add_generation_prompt": True}
    try:
        text: str = tokenizer.apply_chat_template(turns, **variables | fixed)
    except ImportError:
        raise
    except Exception as error:  # a template is a program that may raise anything
        raise invalid(
            f"The model's chat template rejects these messages: {shown(str(error))}.", "messages"
        ) from None
    return text


def template_turns(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as a chat template reads them; it knows a developer as the system.

    A tool's message has the name of the function, by which some templates know it.
    """
    names = {call.id: call.function.name for m in messages for call in m.tool_calls or []}
    turns = []
    for message in messages:
        turn = message.model_dump(include=_TURN_FIELDS, exclude_none=True)
        if message.role == "tool":
            turn["name"] = names.get(message.tool_call_id or "", "")
        turns.append(turn | {"role": "system"} if message.role == "developer" else turn)
    return turns


def _answer_key(message: ChatMessage) -> str:
    """Content and tool calls of a message, by which an answer is known again."""
    return message.model_dump_json(include={"content", "tool_calls"})


def default_sampling(llm: Any, model: str) -> Mapping[str, float]:
    """How answers are sampled unless a request says otherwise.

    That is what the model's `generation_config` says, or its publisher for a file of a package,
    else `MILD_SAMPLING`.
    """
    config = llm.model.generation_config
    own: dict[str, Any] = {name: getattr(config, name, None) for name in _SAMPLING_FIELDS}
    own = {name: value for name, value in own.items() if value is not None}
    return own or (MODELS[model].sampling if model in MODELS else {}) or MILD_SAMPLING


def stop_tokens(llm: Any, tokenizer: Any) -> tuple[int, ...]:
    """Token ids that end an answer: those of the generation config and of the tokenizer."""
    config = llm.model.generation_config
    end = None if config is None else config.eos_token_id
    ids = {*(end if isinstance(end, list | tuple) else [end]), tokenizer.eos_token_id}
    return tuple(sorted(token for token in ids if token is not None))


def grammar_compiler(llm: Any, tokenizer: Any, vocab_size: int) -> GrammarCompiler:
    """Make what compiles the grammars of answers, for a model with its tokenizer."""
    stops = stop_tokens(llm, tokenizer)
    return GrammarCompiler(tokenizer, vocab_size=vocab_size, stop_token_ids=stops)
