"""Errors of the OpenAI API: a status code and a JSON object, which names the request too."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import Scope

from rap_env.errors import RapError

CLIENT_CLOSED_REQUEST = 499
"""Status of a response that no client receives, as in nginx's log."""


@dataclass(eq=False)
class ApiError(RapError):
    """Error response: an HTTP status, and the API's message, type, field (`param`) and code."""

    status: int
    message: str
    _: KW_ONLY
    kind: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message

    @property
    def outcome(self) -> str:
        """Label in the metrics: the code, or a name for the status."""
        return self.code or ("invalid" if self.status < 500 else "error")

    def to_json(self, scope: Scope | None = None) -> dict[str, Any]:
        """Body of the response to the request of an ASGI scope, which has the request's id."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
                "request_id": (scope or {}).get("state", {}).get("request_id"),
            }
        }

    def response(self, scope: Scope) -> JSONResponse:
        """Response to the request of an ASGI scope."""
        return JSONResponse(self.to_json(scope), self.status, headers=self.headers)


def invalid(message: str, param: str | None = None, code: str | None = "invalid_value") -> ApiError:
    """400: the request is invalid."""
    return ApiError(400, message, param=param, code=code)


def unknown_model(name: str, known: str) -> ApiError:
    """404: the model is not the one that is served."""
    return ApiError(
        404,
        f"The model `{shown(name)}` does not exist or you do not have access to it; "
        f"this server has `{known}`.",
        param="model",
        code="model_not_found",
    )


def too_large(limit_bytes: int) -> ApiError:
    """413: the body is longer than the limit."""
    return ApiError(
        413,
        f"The request body is longer than {limit_bytes} bytes, the most that this server reads.",
        code="request_too_large",
        headers={"connection": "close"},
    )


def unavailable(
    message: str, code: str = "service_unavailable", *, retry_after_s: int | None = 1
) -> ApiError:
    """503: the server cannot answer this request now, but may after some seconds.

    Without these, it cannot as long as its limits stay, and OpenAI's clients do not ask again.
    """
    if retry_after_s is None:
        headers = {"x-should-retry": "false"}
    else:
        headers = {"retry-after": str(retry_after_s)}
    return ApiError(503, message, kind="server_error", code=code, headers=headers)


def shutting_down() -> ApiError:
    """503: the server accepts no more requests."""
    return unavailable("The server is shutting down; ask again later.", "shutting_down")


def failed(message: str) -> ApiError:
    """500: an unexpected error."""
    return ApiError(500, message, kind="server_error", code="internal_error")


def shown(value: object, most: int = 80) -> str:
    """Text of a value for an error message, shortened to `most` characters."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= most else f"{text[:most]}..."
