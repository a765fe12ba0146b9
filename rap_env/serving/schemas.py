"""Request bodies: read within limits of size and time, parsed, and validated.

The models declare the fields that this server acts on. Of all other fields, those that cannot
change the answer are ignored, and the rest is rejected: silently ignoring them would give a
wrong answer, and an unknown field is most likely misspelt.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NoReturn, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError
from starlette.requests import ClientDisconnect, Request

from rap_env.artifacts import package_json
from rap_env.serving.errors import ApiError, invalid, shown, too_large
from rap_env.serving.settings import ServerSettings

LINGER_BYTES = 8 * 1024 * 1024
"""Bytes of a rejected body that are still read and dropped: a client that is cut off while it
sends seldom reads the error response."""
LINGER_S = 2.0
"""Longest time for that, in seconds."""

Number = Annotated[float, Field(allow_inf_nan=False)]
Penalty = Annotated[Number, Field(ge=-2, le=2)]
Bias = Annotated[Number, Field(ge=-100, le=100)]
_MAX_SEED = 2**63 - 1
_MAX_STOP_STRINGS, _MAX_STOP_CHARS, _MAX_MESSAGES = 4, 256, 1024
_UNSUPPORTED_IN_MESSAGES = ("tool_calls", "function_call", "audio")


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


class ChatMessage(BaseModel):
    """A message of a chat; its `content` is text alone."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_joined_parts)]

    @model_validator(mode="after")
    def _check_others(self) -> Self:
        for name in _UNSUPPORTED_IN_MESSAGES:
            if (self.model_extra or {}).get(name):
                raise PydanticCustomError("unsupported", f"'{name}' is not supported")
        return self


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=_MAX_MESSAGES)]


class BaseCompletionRequest(BaseModel):
    """Fields that both kinds of completion share.

    Not part of the OpenAI API are `top_k`, which 0 or -1 disables, `ignore_eos`, with which an end
    token does not end the answer, and `structured_outputs`, all of which vLLM's server has too, as
    it has a `response_format` in plain completions; and `max_delta_nll`, the request's floor of
    quality in nats per token.
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
    ignore_eos: bool | None = None
    max_delta_nll: Annotated[Number, Field(ge=0)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Bias] | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None

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

    @property
    def new_tokens(self) -> int | None:
        """Most tokens of an answer; `max_tokens` is the older name of the field."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(BaseCompletionRequest):
    """Body of ``POST /v1/completions``; with `echo`, the answer may have no tokens of its own."""

    prompt: Annotated[list[Any], BeforeValidator(_prompt_entries)] = [""]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None


class TokenizeRequest(BaseModel):
    """Body of ``POST /tokenize``: a text (`prompt`), or `messages` of a chat."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None


class DetokenizeRequest(BaseModel):
    """Body of ``POST /detokenize``: token ids."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]]


BodyT = TypeVar("BodyT", bound=BaseCompletionRequest)
FieldsT = TypeVar("FieldsT", bound=BaseModel)


async def read_json(request: Request, settings: ServerSettings) -> dict[str, Any]:
    """Read the body of an HTTP request, a JSON object.

    Raises:
        ApiError: 400 if the body is invalid, 413 if it is too long, whether or not it declares its
            length, 408 if it is too slow.
        ClientDisconnect: The client disconnected.
    """
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip()
    if kind.lower() != "application/json":
        raise invalid(
            f"Unsupported content type: '{shown(kind)}'; send 'Content-Type: application/json'.",
            code="unsupported_content_type",
        )
    most = settings.max_body_bytes
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > most:
        if "expect" not in request.headers and int(declared) <= LINGER_BYTES:
            await _drop_rest(request)
        raise too_large(most)
    body = bytearray()
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > most:
                    break
    except TimeoutError:
        raise ApiError(
            408,
            f"The request body was not complete after {settings.body_timeout_s:g} seconds.",
            code="request_timeout",
            headers={"connection": "close"},
        ) from None
    if len(body) > most:
        await _drop_rest(request)
        raise too_large(most)
    return parse_json(bytes(body))


async def _drop_rest(request: Request) -> None:
    """Read and drop the rest of a body, within `LINGER_BYTES` and `LINGER_S`."""
    seen = 0
    with contextlib.suppress(TimeoutError, ClientDisconnect):
        async with asyncio.timeout(LINGER_S):
            while seen < LINGER_BYTES:
                message = await request.receive()
                if message["type"] != "http.request" or not message.get("more_body", False):
                    return
                seen += len(message.get("body", b""))


def parse_json(body: bytes) -> dict[str, Any]:
    """Parse a JSON object; anything else is an `ApiError` (400)."""
    try:
        value = json.loads(body, parse_constant=_reject_constant)
        if b"\\u" in body:  # may be half of a surrogate pair, which no response could quote
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise invalid(
            f"We could not parse the JSON body of your request: {shown(str(error))}.",
            code="invalid_json",
        ) from None
    if not isinstance(value, dict):
        raise invalid(
            f"The body must be a JSON object, not {type(value).__name__}.", code="invalid_json"
        )
    return value


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def validate(schema: type[BodyT], body: dict[str, Any]) -> BodyT:
    """Validate a parsed body; a missing, invalid or unsupported field is an `ApiError` (400)."""
    request = validate_fields(schema, body)
    _check_other_fields(request.model_extra or {}, chat=schema is ChatCompletionRequest)
    if isinstance(request, ChatCompletionRequest) and request.top_logprobs and not request.logprobs:
        raise invalid("'top_logprobs' is only allowed when 'logprobs' is true.", "top_logprobs")
    if isinstance(request, CompletionRequest) and request.max_tokens == 0 and not request.echo:
        raise invalid("'max_tokens' must be at least 1 unless 'echo' is true.", "max_tokens")
    if request.stream_options is not None and not request.stream:
        raise invalid("'stream_options' is only allowed when 'stream' is true.", "stream_options")
    return request


def validate_fields(schema: type[FieldsT], body: dict[str, Any]) -> FieldsT:
    """Validate the declared fields of a parsed body; an invalid one is an `ApiError` (400)."""
    try:
        return schema.model_validate(body)
    except ValidationError as error:
        raise _first_error(error) from None


def _first_error(error: ValidationError) -> ApiError:
    """Convert the first error of pydantic to one of the API."""
    details = error.errors(include_url=False)[0]
    name, *inside = details["loc"]
    param = str(name) + "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}" for part in inside
    )
    if details["type"] == "missing":
        return invalid(
            f"Missing required parameter: '{param}'.", param, "missing_required_parameter"
        )
    if details["type"] == "extra_forbidden":
        return _unknown_parameter(param)
    wrong_type = details["type"].endswith("_type")
    return invalid(
        f"Invalid {'type' if wrong_type else 'value'} for '{param}': {details['msg']}, "
        f"but got {shown(repr(details['input']))}.",
        param,
        "invalid_type" if wrong_type else "invalid_value",
    )


def _unknown_parameter(name: str) -> ApiError:
    return invalid(f"Unknown parameter: '{shown(name)}'.", shown(name), "unknown_parameter")


_OTHER_FIELDS: dict[str, Any] = package_json("rap_env.serving", "other_fields.json")
"""Undeclared fields of the API. Ignored ones are about billing, storage or speed and cannot change
the answer. For each other one: the values that have no effect, and a hint for the error message."""


def _check_other_fields(fields: Mapping[str, Any], *, chat: bool) -> None:
    """Reject undeclared fields that are unknown or would change the answer."""
    limits = _OTHER_FIELDS["chat" if chat else "completion"]
    for name, value in fields.items():
        if name in _OTHER_FIELDS["ignored"]:
            continue
        if name not in limits:
            raise _unknown_parameter(name)
        if value not in limits[name]["neutral"]:
            hint = limits[name]["hint"]
            message = f"Unsupported parameter: '{name}' is not supported with this server; {hint}"
            raise invalid(message, name, "unsupported_parameter")
