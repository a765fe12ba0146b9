"""Errors as the OpenAI API gives them: a status code and a JSON object with four keys."""

from __future__ import annotations

from typing import Any

from rap_env.errors import RapError


class ApiError(RapError):
    """What a client is told when its request is not answered.

    Args:
        status: HTTP status code.
        message: One sentence: what is wrong, what was seen, what to do.
        kind: The API's error type.
        param: The request's field at fault, if it is one.
        code: The API's code for programs, if it has one.
        headers: More headers for the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def outcome(self) -> str:
        """A word for the metrics: the code, or a name for the status."""
        return self.code or ("invalid" if self.status < 500 else "error")

    def to_json(self) -> dict[str, Any]:
        """The response's body."""
        return {
            "error": {
                "message": str(self),
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }


def invalid(message: str, param: str | None = None, code: str | None = "invalid_value") -> ApiError:
    """400: the request itself is wrong."""
    return ApiError(400, message, param=param, code=code)


def unsupported(param: str, hint: str) -> ApiError:
    """400: the API knows this field, and this server cannot do what it asks."""
    return ApiError(
        400,
        f"Unsupported parameter: '{param}' is not supported with this server; {hint}",
        param=param,
        code="unsupported_parameter",
    )


def unknown_model(name: str, known: str) -> ApiError:
    """404: another model than the one that is served."""
    return ApiError(
        404,
        f"The model `{shown(name)}` does not exist or you do not have access to it; "
        f"this server has `{known}`.",
        param="model",
        code="model_not_found",
    )


def too_large(limit_bytes: int) -> ApiError:
    """413: the body is longer than the server reads."""
    return ApiError(
        413,
        f"The request body is longer than {limit_bytes} bytes, the most that this server reads.",
        code="request_too_large",
        headers={"connection": "close"},
    )


def too_slow(timeout_s: float) -> ApiError:
    """408: the body did not arrive in time."""
    return ApiError(
        408,
        f"The request body was not complete after {timeout_s:g} seconds.",
        code="request_timeout",
        headers={"connection": "close"},
    )


def queue_full(message: str) -> ApiError:
    """429: too many requests wait already."""
    return ApiError(
        429, message, kind="requests", code="rate_limit_exceeded", headers={"retry-after": "1"}
    )


def unavailable(message: str, code: str = "service_unavailable") -> ApiError:
    """503: the server cannot answer this now."""
    return ApiError(503, message, kind="server_error", code=code, headers={"retry-after": "1"})


def failed(message: str) -> ApiError:
    """500: something that should not happen did."""
    return ApiError(500, message, kind="server_error", code="internal_error")


def shown(value: object, most: int = 80) -> str:
    """A value for an error message, cut where it is long."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= most else f"{text[:most]}..."
