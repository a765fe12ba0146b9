"""What a request may say: the fields that this server acts on, typed and bounded."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError

from rap_env.serving.errors import ApiError, invalid, shown
from rap_env.serving.fields import check_other_fields

Number = Annotated[float, Field(allow_inf_nan=False)]
_MOST_SEED = 2**63 - 1


class StreamOptions(BaseModel):
    """How a stream ends."""

    model_config = ConfigDict(extra="ignore")
    include_usage: StrictBool | None = None


class CommonRequest(BaseModel):
    """What both kinds of completion have in common.

    `top_k` is not of the API; as in other servers, 0 or -1 is off.
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
    seed: Annotated[int, Field(ge=-_MOST_SEED - 1, le=_MOST_SEED)] | None = None
    stop: Any = None

    @property
    def stops(self) -> list[str]:
        """The stop strings.

        Raises:
            ApiError: They are no strings (400).
        """
        given = [self.stop] if isinstance(self.stop, str) else self.stop
        if given is None:
            return []
        if not isinstance(given, list) or not all(isinstance(text, str) for text in given):
            raise invalid("'stop' must be a string or a list of strings.", "stop", "invalid_type")
        if not all(given):
            raise invalid("A stop string must not be empty.", "stop")
        return given

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def new_tokens(self) -> int | None:
        """Most tokens of an answer, if the request says so."""
        return self.max_tokens

    @property
    def wants_logprobs(self) -> bool:
        """Whether the log probability of each token is asked for."""
        return False


class ChatRequest(CommonRequest):
    """The body of ``POST /v1/chat/completions``."""

    messages: list[dict[str, Any]]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None

    @property
    def new_tokens(self) -> int | None:
        """Most tokens of an answer; `max_tokens` is the field's older name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def wants_logprobs(self) -> bool:
        """Whether the log probability of each token is asked for."""
        return bool(self.logprobs)


class CompletionRequest(CommonRequest):
    """The body of ``POST /v1/completions``."""

    prompt: Any = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    @property
    def wants_logprobs(self) -> bool:
        """Whether the log probability of each token is asked for."""
        return self.logprobs is not None


Asked = TypeVar("Asked", bound=CommonRequest)


def read_request(kind: type[Asked], body: dict[str, Any]) -> Asked:
    """A checked request.

    Args:
        kind: `ChatRequest` or `CompletionRequest`.
        body: What the client sent.

    Raises:
        ApiError: A field is missing, wrong, unknown, or asks for what there is not (400).
    """
    try:
        asked = kind.model_validate(body)
    except ValidationError as error:
        raise _first_mistake(error) from None
    check_other_fields(asked.model_extra or {}, chat=kind is ChatRequest)
    if isinstance(asked, CompletionRequest) and asked.logprobs:
        raise invalid(
            "Only the log probability of the chosen tokens is known; 'logprobs' must be 0.",
            "logprobs",
        )
    if asked.stream_options is not None and not asked.stream:
        raise invalid("'stream_options' is only allowed when 'stream' is true.", "stream_options")
    return asked


def _first_mistake(error: ValidationError) -> ApiError:
    """The first of what pydantic found, in the API's words."""
    found = error.errors(include_url=False)[0]
    name, *inside = found["loc"]
    param = str(name) + "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}" for part in inside
    )
    if found["type"] == "missing":
        return invalid(
            f"Missing required parameter: '{param}'.", param, "missing_required_parameter"
        )
    wrong_type = found["type"].endswith("_type")
    return invalid(
        f"Invalid {'type' if wrong_type else 'value'} for '{param}': {found['msg']}, "
        f"but got {shown(repr(found['input']))}.",
        param,
        "invalid_type" if wrong_type else "invalid_value",
    )
