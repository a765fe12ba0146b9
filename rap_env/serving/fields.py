"""Fields of the API that this server does not act on: harmless ones pass, others are refused.

A field that would change the answer must not be dropped in silence; a field that nobody knows
is most likely misspelt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rap_env.serving.errors import invalid, shown, unsupported

HARMLESS = frozenset(
    {
        "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
        "prompt_cache_retention", "parallel_tool_calls", "prediction",
    }
)  # fmt: skip
"""They change who pays, what is kept, or how fast it goes, never the answer."""

_NO_TOOLS = "it calls no tools; leave it out."
_NO_PENALTY = "tokens are not penalised here; set it to 0 or leave it out."
_TEXT_ONLY = "it reads and writes text; leave it out."
_EMPTY: tuple[Any, ...] = (None, [], {}, False)

_COMMON: dict[str, tuple[tuple[Any, ...], str]] = {
    "frequency_penalty": ((None, 0), _NO_PENALTY),
    "presence_penalty": ((None, 0), _NO_PENALTY),
    "logit_bias": ((None, {}), "no logits are biased here; leave it out."),
}
_CHAT = {
    **_COMMON,
    "tools": (_EMPTY, _NO_TOOLS),
    "tool_choice": ((None, "none", "auto"), _NO_TOOLS),
    "functions": (_EMPTY, _NO_TOOLS),
    "function_call": ((None, "none", "auto"), _NO_TOOLS),
    "response_format": (
        (None, {"type": "text"}),
        "answers are free text; use {'type': 'text'} or leave it out.",
    ),
    "top_logprobs": (
        (None, 0),
        "only the log probability of the chosen tokens is known; set it to 0.",
    ),
    "modalities": ((None, ["text"]), _TEXT_ONLY),
    "audio": ((None,), _TEXT_ONLY),
    "web_search_options": ((None,), "it searches nothing; leave it out."),
    "reasoning_effort": ((None, "none"), "it has no reasoning modes; leave it out."),
    "verbosity": ((None, "medium"), "it has no verbosity modes; leave it out."),
}
_COMPLETION = {
    **_COMMON,
    "echo": ((None, False), "put the prompt before the answer yourself, or leave it out."),
    "suffix": ((None, ""), "it completes prompts at their end alone; leave it out."),
    "best_of": ((None, 1), "ask for several answers with 'n' and choose among them yourself."),
}


def check_other_fields(fields: Mapping[str, Any], *, chat: bool) -> None:
    """Refuse what would change the answer and is not done, and what the API does not know.

    Args:
        fields: Fields of a request that no schema names.
        chat: Whether it is a chat completion.

    Raises:
        ApiError: One must be refused (400).
    """
    limits = _CHAT if chat else _COMPLETION
    for name, value in fields.items():
        if name in HARMLESS:
            continue
        if name not in limits:
            raise invalid(f"Unknown parameter: '{shown(name)}'.", shown(name), "unknown_parameter")
        neutral, hint = limits[name]
        if not any(value == other for other in neutral):
            raise unsupported(name, hint)
