"""Request bodies: their fields, and how these are validated.

The models declare the fields that this server acts on. Of all other fields, those that cannot
change the answer are ignored, and the rest is rejected: silently ignoring them would give a
wrong answer, and an unknown field is most likely misspelt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
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
from pydantic_core import PydanticCustomError

from rap_env.artifacts import package_json
from rap_env.serving.http import ApiError, invalid, shown

Number = Annotated[float, Field(allow_inf_nan=False)]
Penalty = Annotated[Number, Field(ge=-2, le=2)]
Bias = Annotated[Number, Field(ge=-100, le=100)]
_MAX_SEED = 2**63 - 1
_MAX_STOP_STRINGS, _MAX_STOP_CHARS, _MAX_MESSAGES = 4, 256, 1024
_MAX_SALT_CHARS = 256
_UNSUPPORTED_IN_MESSAGES = ("function_call", "audio")


def _listed(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


class TextPart(BaseModel):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


_CONTENT: TypeAdapter[str | list[TextPart]] = TypeAdapter(
    str | Annotated[list[TextPart], Field(min_length=1)]
)
TokenIds = Annotated[list[StrictInt], Field(min_length=1)]
_PROMPT: TypeAdapter[str | list[Any]] = TypeAdapter(
    str | TokenIds | Annotated[list[str | TokenIds], Field(min_length=1)]
)


def _joined_parts(content: Any) -> str:
    """The text of a message, given as a string or as a list of parts."""
    try:
        parts = _CONTENT.validate_python(content)
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

    model_config = ConfigDict(extra="ignore")
    include_usage: StrictBool | None = None


class FunctionCall(BaseModel):
    """Name and arguments of a call that an earlier answer made."""

    name: str
    arguments: Json[dict[str, Any]]


class ToolCall(BaseModel):
    """A call that an earlier answer made."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Function(BaseModel):
    """A function that answers may call; `parameters` is a JSON schema."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str = ""
    parameters: dict[str, Any] = {"type": "object", "properties": {}}
    strict: StrictBool | None = None


class Tool(BaseModel):
    """A tool that answers may use: a function."""

    type: Literal["function"]
    function: Function


class ChatMessage(BaseModel):
    """A message of a chat; its `content` is text alone, empty beside calls without a text."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str, BeforeValidator(_joined_parts)]
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _content_beside_calls(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("tool_calls") and given.get("content") is None:
            return {**given, "content": ""}
        return given

    @model_validator(mode="after")
    def _check_others(self) -> Self:
        for name in _UNSUPPORTED_IN_MESSAGES:
            if (self.model_extra or {}).get(name):
                raise PydanticCustomError("unsupported", f"'{name}' is not supported")
        return self


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=_MAX_MESSAGES)]


class BaseCompletionRequest(BaseModel):
    """Fields that both kinds of completion share.

    Not part of the OpenAI API are `max_delta_nll`, the request's floor of quality in nats per
    token, and `top_k`, which 0 or -1 disables, `cache_salt` (only what was
    kept of requests with the same one is used), and a `response_format` in plain completions,
    all of which vLLM's server has too.
    """

    model_config = ConfigDict(strict=True, extra="allow")

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-_MAX_SEED - 1, le=_MAX_SEED)] | None = None
    stop: (
        Annotated[list[StopString], BeforeValidator(_listed), Field(max_length=_MAX_STOP_STRINGS)]
        | None
    ) = None
    max_delta_nll: Annotated[Number, Field(ge=0)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=_MAX_SALT_CHARS)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Bias] | None = None
    response_format: dict[str, Any] | None = None

    @property
    def new_tokens(self) -> int | None:
        """Most tokens of an answer, if the request sets a number."""
        return self.max_tokens


class ChatCompletionRequest(BaseCompletionRequest):
    """Body of ``POST /v1/chat/completions``."""

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | Tool | None = None
    parallel_tool_calls: bool | None = None

    @property
    def offered_tools(self) -> list[Tool]:
        """The tools that the answers may use."""
        return [] if self.tool_choice == "none" else self.tools or []

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
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool | None = None


BodyT = TypeVar("BodyT", bound=BaseCompletionRequest)


def validate(schema: type[BodyT], body: dict[str, Any]) -> BodyT:
    """Validate a parsed body; a missing, invalid or unsupported field is an `ApiError` (400)."""
    try:
        request = schema.model_validate(body)
    except ValidationError as error:
        raise _first_error(error) from None
    _check_other_fields(request.model_extra or {}, chat=schema is ChatCompletionRequest)
    if isinstance(request, ChatCompletionRequest):
        if request.top_logprobs and not request.logprobs:
            raise invalid("'top_logprobs' is only allowed when 'logprobs' is true.", "top_logprobs")
        names = [tool.function.name for tool in request.offered_tools]
        chosen = request.chosen_function
        if (request.tool_choice == "required" and not names) or chosen not in (None, *names):
            raise invalid("'tool_choice' needs a function that is in 'tools'.", "tool_choice")
    if request.stream_options is not None and not request.stream:
        raise invalid("'stream_options' is only allowed when 'stream' is true.", "stream_options")
    return request


def _first_error(error: ValidationError) -> ApiError:
    """Convert the first error of pydantic to one of the API."""
    details = error.errors(include_url=False)[0]
    name, *inside = details["loc"]
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


_OTHER_FIELDS: dict[str, Any] = package_json("rap_env.serving", "other_fields.json")
"""Undeclared fields of the API. Ignored ones are about billing, storage or speed and cannot
change the answer. For each other one: the values that have no effect, and a hint for the
error message."""


def _check_other_fields(fields: Mapping[str, Any], *, chat: bool) -> None:
    """Reject undeclared fields that are unknown or would change the answer."""
    limits = _OTHER_FIELDS["chat" if chat else "completion"]
    for name, value in fields.items():
        if name in _OTHER_FIELDS["ignored"]:
            continue
        if name not in limits:
            unknown = shown(name)
            raise invalid(f"Unknown parameter: '{unknown}'.", unknown, "unknown_parameter")
        if value not in limits[name]["neutral"]:
            hint = limits[name]["hint"]
            message = f"Unsupported parameter: '{name}' is not supported with this server; {hint}"
            raise invalid(message, name, "unsupported_parameter")


_FORMATS = ("text", "json_object", "json_schema")


def answer_schema(given: dict[str, Any] | None) -> dict[str, Any] | None:
    """The JSON schema of a `response_format`, as in OpenAI's API; None for free text.

    Raises:
        ApiError: The format is invalid (400).
    """
    kind = "text" if given is None else given.get("type")
    if given is None or kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    if kind != "json_schema":
        raise invalid(
            f"Invalid value for 'response_format.type': {shown(repr(kind))}; supported are "
            f"{', '.join(map(repr, _FORMATS))}.",
            "response_format.type",
        )
    named = given.get("json_schema")
    schema = named.get("schema") if isinstance(named, dict) else None
    if not isinstance(schema, dict):
        raise invalid(
            "'response_format.json_schema.schema' must be a JSON schema, an object.",
            "response_format.json_schema.schema",
            "invalid_type",
        )
    return schema
