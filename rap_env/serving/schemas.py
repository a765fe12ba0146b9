"""Request bodies: their fields, and how these are validated.

The models declare the fields that this server acts on; their descriptions are the reference of
the documentation. Other fields are ignored and reported, or rejected by a strict server.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, cast

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Json,
    StrictBool,
    StrictInt,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from rap_env.runtime.structured_output import GrammarKind
from rap_env.serving.http import ApiError, invalid, shown

Number = Annotated[float, Field(allow_inf_nan=False)]
Penalty = Annotated[Number, Field(ge=-2, le=2)]
Bias = Annotated[Number, Field(ge=-100, le=100)]
Share = Annotated[Number, Field(ge=0, le=1)]
JsonSchema = dict[str, Any] | Json[dict[str, Any]]
TokenId = Annotated[StrictInt, Field(ge=0, lt=2**31)]
_MAX_SEED = 2**63 - 1
_MAX_STOP_STRINGS, _MAX_STOP_CHARS, _MAX_MESSAGES = 4, 256, 1024
_MAX_SALT_CHARS = 256
_IGNORED = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prediction", "include"),
    *("prompt_cache_key", "prompt_cache_retention", "cache_prompt", "keep_alive", "truncation"),
}
"""Other fields that cannot change an answer: they are about billing, storage or speed."""


def _listed(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


class TextPart(BaseModel):
    """A part of a message's content."""

    type: Literal["text", "input_text", "output_text"]
    text: str


_CONTENT: TypeAdapter[str | list[TextPart]] = TypeAdapter(
    str | Annotated[list[TextPart], Field(min_length=1)]
)
TokenIds = Annotated[list[StrictInt], Field(min_length=1)]
_PROMPT: TypeAdapter[str | list[Any]] = TypeAdapter(
    str | TokenIds | Annotated[list[str | TokenIds], Field(min_length=1)]
)


def _joined_parts(content: Any) -> str:
    """The text of a message, given as a string or as a list of parts; null is no text."""
    try:
        parts = _CONTENT.validate_python("" if content is None else content)
    except ValidationError:
        raise PydanticCustomError(
            "content_type", "Input should be a string or a list of parts of type 'text'"
        ) from None
    return parts if isinstance(parts, str) else "".join(part.text for part in parts)


def _prompt_entries(prompt: Any) -> list[str | list[int]]:
    """The prompts of a plain completion; none is an empty text, as in the API."""
    try:
        entries = _PROMPT.validate_python("" if prompt is None else prompt)
    except ValidationError:
        raise PydanticCustomError(
            "prompt_type",
            "Input should be a string, a list of strings, a list of token ids, or a list of such "
            "lists",
        ) from None
    return [entries] if isinstance(entries, str) or isinstance(entries[0], int) else entries


StopString = Annotated[str, Field(min_length=1, max_length=_MAX_STOP_CHARS)]


class StreamOptions(BaseModel):
    """Options of a stream."""

    include_usage: StrictBool | None = None


class FunctionCall(BaseModel):
    """Name and arguments of a call that an earlier answer made; no arguments are an empty text."""

    name: str
    arguments: Annotated[Json[dict[str, Any]], BeforeValidator(lambda text: text or "{}")]


class ToolCall(BaseModel):
    """A call that an earlier answer made."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Function(BaseModel):
    """A function that answers may call; `parameters` is a JSON schema."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: Annotated[str, BeforeValidator(lambda text: text or "")] = ""
    parameters: Annotated[
        dict[str, Any],
        BeforeValidator(lambda schema: schema or {"type": "object", "properties": {}}),
    ] = Field({}, validate_default=True)
    strict: StrictBool | None = None


class Tool(BaseModel):
    """A tool that answers may use: a function."""

    type: Literal["function"]
    function: Function


class ChatMessage(BaseModel):
    """A message of a chat; its `content` is text alone, empty beside calls without a text."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str, BeforeValidator(_joined_parts)] = ""
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class StructuredOutputs(BaseModel):
    """What an answer has to follow, as in vLLM; at most one of them."""

    model_config = ConfigDict(extra="ignore")

    json_schema: JsonSchema | None = Field(None, alias="json")
    choice: Annotated[list[str], Field(min_length=1)] | None = None
    regex: str | None = None
    grammar: str | None = None


class SamplingFields(BaseModel):
    """Fields that all kinds of completion share."""

    model_config = ConfigDict(strict=True, extra="allow", use_attribute_docstrings=True)

    model: str | None = None
    """Any name: one model is served. A strict server has its own name alone."""
    stream: bool | None = None
    """Whether the answer comes as server-sent events while it is generated."""
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    """0 to 2: divides the logits; 0 takes the likeliest token."""
    top_p: Share | None = None
    """0 to 1: samples among the likeliest tokens that together have this probability."""
    top_k: Annotated[int, Field(ge=-1)] | None = None
    """Samples among so many likeliest tokens; 0 and -1 for all."""
    min_p: Share | None = None
    """0 to 1: samples among tokens with at least this part of the likeliest one's probability."""
    repetition_penalty: Annotated[Number, Field(gt=0, le=10)] | None = Field(
        None, validation_alias=AliasChoices("repetition_penalty", "repeat_penalty")
    )
    """Weakens tokens that the prompt or the answer has; 1 does not. Also `repeat_penalty`."""
    presence_penalty: Penalty | None = None
    """-2 to 2: subtracted from the logits of tokens that the answer has."""
    frequency_penalty: Penalty | None = None
    """-2 to 2: subtracted for each time that the answer has the token."""
    seed: Annotated[int, Field(ge=-_MAX_SEED - 1, le=_MAX_SEED)] | None = None
    """64 bits: the same plan gives the same answer again, up to rounding."""
    max_delta_nll: Annotated[Number, Field(ge=0)] | None = None
    """The request's own floor of quality, nats per token."""
    cache_salt: Annotated[str, Field(min_length=1, max_length=_MAX_SALT_CHARS)] | None = None
    """Only what was kept of requests with the same text is used, as in vLLM."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables of the chat template, such as `enable_thinking`."""


class BaseCompletionRequest(SamplingFields):
    """Fields that chats and plain completions share."""

    stream_options: StreamOptions | None = None
    """`include_usage`: whether a stream ends with the numbers of tokens."""
    max_tokens: Annotated[int, Field(ge=-1)] | None = Field(
        None, validation_alias=AliasChoices("max_tokens", "n_predict")
    )
    """Most tokens of an answer; -1, and what is more than the context has left, means all of
    that. 256 by default in chats, 16 in plain completions. Also `n_predict`."""
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    """Fewest tokens of an answer, unless a grammar ends it or a stop string."""
    ignore_eos: bool | None = None
    """Whether the answer goes on to its most tokens, as load generators ask for."""
    n: Annotated[int, Field(ge=1)] | None = None
    """Answers to each prompt, at most 8 in all; with a seed, each has its own."""
    stop: (
        Annotated[list[StopString], BeforeValidator(_listed), Field(max_length=_MAX_STOP_STRINGS)]
        | None
    ) = None
    """A text, or up to 4 of them, before which the answer ends."""
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    """More tokens that end the answer; they are no part of it."""
    logit_bias: dict[str, Bias] | None = None
    """Token ids, and what is added to their logits, -100 to 100."""
    response_format: dict[str, Any] | None = None
    """`text`, `json_object` (with `schema`, if one is given) or `json_schema`."""
    structured_outputs: StructuredOutputs | None = None
    """One of `json` (a schema), `choice` (texts), `regex` and `grammar` (in the form of Lark or
    GBNF), as in vLLM. Also under the older names `guided_json`, `guided_choice`, ..."""

    @model_validator(mode="before")
    @classmethod
    def _guided(cls, given: Any) -> Any:
        older = {f"guided_{name}": name for name in ("json", "choice", "regex", "grammar")}
        if not isinstance(given, dict) or older.keys().isdisjoint(given):
            return given
        asked = {older[name]: value for name, value in given.items() if name in older}
        others = {name: value for name, value in given.items() if name not in older}
        return {"structured_outputs": asked, **others}

    @property
    def new_tokens(self) -> int | None:
        """Most tokens of an answer, -1 for any number; None if the request does not say."""
        return self.max_tokens


class ChatCompletionRequest(BaseCompletionRequest):
    """Body of ``POST /v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=_MAX_MESSAGES)]
    """The chat: `role`, `content` (a text, or parts of type `text`), `tool_calls`."""
    max_completion_tokens: Annotated[int, Field(ge=-1)] | None = None
    """The newer name of `max_tokens`."""
    logprobs: bool | None = None
    """Whether the answer has the log-probabilities of its tokens."""
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """0 to 20: so many of the likeliest tokens beside each of them."""
    tools: list[Tool] | None = None
    """Functions: `name`, `description`, `parameters` (a JSON schema), `strict`."""
    tool_choice: Literal["none", "auto", "required"] | Tool | None = None
    """`none`, `auto` (the default), `required`, or one function."""
    parallel_tool_calls: bool | None = None
    """If false, an answer has at most one call."""

    @property
    def offered_tools(self) -> list[Tool]:
        """The tools that the answers may use."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def must_call(self) -> bool:
        """Whether the answers must call a tool."""
        return self.tool_choice not in (None, "auto", "none")

    @property
    def chosen_function(self) -> str | None:
        """The one function that the answers must call."""
        return self.tool_choice.function.name if isinstance(self.tool_choice, Tool) else None

    @property
    def new_tokens(self) -> int | None:
        """Most tokens of an answer; `max_tokens` is the older name of the field."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(BaseCompletionRequest):
    """Body of ``POST /v1/completions``."""

    prompt: Annotated[list[Any], BeforeValidator(_prompt_entries)] = [""]
    """A text or a list of token ids, or up to 8 of them."""
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    """0 to 5: so many likeliest tokens beside each token, and beside a stop token, as in vLLM."""
    echo: bool | None = None
    """Whether the answer begins with the prompt; with `logprobs`, it is scored."""


class TokenizeRequest(BaseModel):
    """Body of ``POST /tokenize``, as llama.cpp (`content`) and vLLM (`prompt`) have it."""

    content: str = Field(validation_alias=AliasChoices("content", "prompt"))
    add_special: bool = Field(
        False, validation_alias=AliasChoices("add_special", "add_special_tokens")
    )


class DetokenizeRequest(BaseModel):
    """Body of ``POST /detokenize``."""

    tokens: list[TokenId]


def other_fields(body: SamplingFields) -> list[str]:
    """Fields of a body that this server does not know, with a value, which might change answers."""
    return [
        name for name, value in (body.model_extra or {}).items() if value and name not in _IGNORED
    ]


def check_body(body: SamplingFields, *, strict: bool) -> None:
    """Check what concerns several fields, and for a strict server that it knows them all.

    Raises:
        ApiError: A field is invalid or unknown (400).
    """
    if strict and (others := other_fields(body)):
        name = shown(others[0])
        message = f"Unsupported parameter: '{name}'; leave it out, or serve without --strict."
        raise invalid(message, name, "unsupported_parameter")
    if isinstance(body, ChatCompletionRequest):
        if body.top_logprobs and not body.logprobs:
            raise invalid("'top_logprobs' is only allowed when 'logprobs' is true.", "top_logprobs")
        names = [tool.function.name for tool in body.offered_tools]
        if (body.must_call and not names) or body.chosen_function not in (None, *names):
            raise invalid("'tool_choice' needs a function that is in 'tools'.", "tool_choice")


def first_error(errors: Sequence[ErrorDetails]) -> ApiError:
    """Convert the first of pydantic's errors to one of the API."""
    details = errors[0]
    name, *inside = [part for part in details["loc"] if part != "body"] or ["body"]
    param = str(name) + "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}" for part in inside
    )
    param = param.partition(".literal[")[0]  # one of several types
    if details["type"] == "missing":
        return invalid(
            f"Missing required parameter: '{param}'.", param, "missing_required_parameter"
        )
    wrong_type = details["type"].endswith("_type")
    return invalid(
        f"Invalid {'type' if wrong_type else 'value'} for '{param}': {details['msg']}, "
        f"but got {shown(repr(details['input']))}.",
        param,
        "invalid_type" if wrong_type else "invalid_value",
    )


_FORMATS = ("text", "json_object", "json_schema")


def answer_grammar(body: BaseCompletionRequest) -> tuple[str, GrammarKind, Any] | None:
    """What an answer has to follow: the field that says so, and kind and content of the grammar.

    It is None for free text.

    Raises:
        ApiError: The format is invalid (400).
    """
    if (schema := _format_schema(body.response_format)) is not None:
        return "response_format", "json_schema", schema
    for kind, content in body.structured_outputs or ():
        if content is not None:
            return "structured_outputs", cast("GrammarKind", kind), content
    return None


def _format_schema(given: dict[str, Any] | None) -> dict[str, Any] | None:
    """The JSON schema of a `response_format`; None for free text."""
    kind = "text" if given is None else given.get("type")
    if given is None or kind == "text":
        return None
    if kind not in _FORMATS:
        raise invalid(
            f"Invalid value for 'response_format.type': {shown(repr(kind))}; supported are "
            f"{', '.join(map(repr, _FORMATS))}.",
            "response_format.type",
        )
    named = given.get("json_schema")
    schema = named.get("schema") if isinstance(named, dict) else given.get("schema")
    if kind == "json_object" and schema is None:
        return {"type": "object"}
    if not isinstance(schema, dict):
        raise invalid(
            "'response_format.json_schema.schema' must be a JSON schema, an object.",
            "response_format.json_schema.schema",
            "invalid_type",
        )
    return schema
