"""What a server allows its clients."""

from __future__ import annotations

from dataclasses import dataclass, fields

from rap_env.errors import ServingSettingsError

_COUNTS = (
    "max_body_bytes", "max_connections", "max_new_tokens", "default_chat_tokens", "max_choices",
    "max_stop_strings", "max_stop_chars", "max_messages",
)  # fmt: skip
_SECONDS = ("header_timeout_s", "body_timeout_s", "write_timeout_s", "shutdown_grace_s")


@dataclass(frozen=True)
class ServingSettings:
    """Names and limits of a server.

    Attributes:
        model_name: What clients write as ``model``.
        policy_name: Who chooses masks; part of the system fingerprint.
        fingerprint: Hash of the model's weights, hex.
        max_body_bytes: Longest request body. With `max_connections` it bounds what requests can
            take beside the model's budget.
        max_connections: Connections at once; more are refused with status 503.
        max_prompt_tokens: Longest prompt; None for what the engine accepts.
        max_new_tokens: Most tokens that one answer may ask for.
        default_chat_tokens: Tokens of a chat answer that does not ask for a number.
        max_choices: Most answers to one request (prompts x ``n``).
        max_stop_strings: Most stop strings; the OpenAI API allows 4.
        max_stop_chars: Longest stop string, in characters.
        max_messages: Most messages of a chat.
        header_timeout_s: Seconds in which a request's header must be complete.
        body_timeout_s: Seconds in which its body must be complete.
        write_timeout_s: Seconds for which a client may leave its answer unread before its
            connection is cut.
        shutdown_grace_s: Seconds that running requests get when the server is told to end.

    Raises:
        ServingSettingsError: A limit is below 1, or a time is not above 0.
    """

    model_name: str
    policy_name: str = "dense"
    fingerprint: str = ""
    max_body_bytes: int = 256 * 1024
    max_connections: int = 128
    max_prompt_tokens: int | None = None
    max_new_tokens: int = 2048
    default_chat_tokens: int = 256
    max_choices: int = 8
    max_stop_strings: int = 4
    max_stop_chars: int = 256
    max_messages: int = 1024
    header_timeout_s: float = 20.0
    body_timeout_s: float = 20.0
    write_timeout_s: float = 60.0
    shutdown_grace_s: float = 10.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in _COUNTS and value < 1:
                raise ServingSettingsError(f"{field.name} must be at least 1, not {value}.")
            if field.name in _SECONDS and not value > 0:
                raise ServingSettingsError(f"{field.name} must be above 0 seconds, not {value}.")
        if self.max_prompt_tokens is not None and self.max_prompt_tokens < 1:
            raise ServingSettingsError(
                f"max_prompt_tokens must be at least 1, or None, not {self.max_prompt_tokens}."
            )
