"""OpenAI's newer API, ``POST /v1/responses``, as chats: its body, and its answers."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, ValidationError

from rap_env.serving.generation import AnswerPlans, OutputDelta
from rap_env.serving.http import invalid, shown
from rap_env.serving.prompts import GenerationRequest
from rap_env.serving.responses import event
from rap_env.serving.schemas import ChatCompletionRequest, SamplingFields, first_error

_MOST_TOKENS = 2048
"""Most tokens of an answer whose request sets no number."""


class ResponsesRequest(SamplingFields):
    """Body of ``POST /v1/responses``."""

    input: str | list[dict[str, Any]]
    """A text, or items: messages, `function_call` and `function_call_output`."""
    instructions: str | None = None
    """What the system says before them."""
    max_output_tokens: int | None = Field(None, ge=-1)
    """As `max_tokens` of a chat, 2,048 by default: clients take a cut answer for a failure."""
    tools: list[dict[str, Any]] | None = None
    """Functions: `type`, `name`, `description`, `parameters`, `strict`."""
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    """`none`, `auto` (the default), `required`, or one function."""
    parallel_tool_calls: bool | None = None
    """If false, an answer has at most one call."""
    text: dict[str, Any] | None = None
    """`format`: `text`, `json_object` or `json_schema`, with `schema` beside `type`."""
    previous_response_id: str | None = None
    """Not supported, as no answers are stored: send them as items of `input`."""

    def chat(self) -> ChatCompletionRequest:
        """The same request as a chat.

        Raises:
            ApiError: A field is invalid or not supported (400).
        """
        if self.previous_response_id:
            raise invalid(
                "'previous_response_id' is not supported, as this server stores no answers; send "
                "the conversation so far as items of 'input'.",
                "previous_response_id",
                "unsupported_parameter",
            )
        choice, form = self.tool_choice, (self.text or {}).get("format")
        if isinstance(choice, dict):
            choice = {"type": "function", "function": {"name": choice.get("name")}}
        kept = self.model_dump(include={*SamplingFields.model_fields}, exclude_none=True)
        functions = [{"type": tool.get("type"), "function": tool} for tool in self.tools or []]
        fields: dict[str, Any] = {
            **(self.model_extra or {}),
            **kept,
            "messages": self._messages(),
            "max_tokens": self.max_output_tokens or _MOST_TOKENS,
            "tools": functions or None,
            "tool_choice": choice,
            "parallel_tool_calls": self.parallel_tool_calls,
            "response_format": form and {**form, "json_schema": form},
        }
        try:
            return ChatCompletionRequest.model_validate(fields)
        except ValidationError as error:
            raise first_error(error.errors()) from None

    def _messages(self) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
        items = self.input
        for item in [{"role": "user", "content": items}] if isinstance(items, str) else items:
            kind = item.get("type", "message")
            if kind == "message":
                messages.append({"role": item.get("role"), "content": item.get("content")})
            elif kind == "function_call":
                if not messages or "tool_calls" not in messages[-1]:
                    messages.append({"role": "assistant", "tool_calls": []})
                function = {"name": item.get("name"), "arguments": item.get("arguments")}
                call = {"id": item.get("call_id"), "function": function}
                messages[-1]["tool_calls"].append(call)
            elif kind == "function_call_output":
                told = {"tool_call_id": item.get("call_id"), "content": item.get("output")}
                messages.append({"role": "tool", **told})
            elif kind != "reasoning":
                raise invalid(f"Items of type {shown(repr(kind))} are not supported.", "input")
        return messages


class ResponsesWriter:
    """Writes an answer, with what `plans` reports at the time of writing."""

    def __init__(self, request: GenerationRequest, *, model: str, plans: AnswerPlans) -> None:
        self._request, self._plans = request, plans
        self._head = {
            **{"id": f"resp_{uuid.uuid4().hex}", "object": "response", "model": model},
            **dict.fromkeys(("error", "instructions", "previous_response_id")),
            **{"created_at": int(time.time()), "parallel_tool_calls": True, "tools": []},
            **{"tool_choice": "auto", "metadata": {}},
            "temperature": request.params.temperature,
            "top_p": request.params.top_p,
            "max_output_tokens": request.params.max_new_tokens,
        }
        self._message_id = f"msg_{uuid.uuid4().hex}"
        self._text, self._reason = "", ""
        self._calls: list[dict[str, Any]] = []
        self._events = 0

    def whole(self, deltas: Sequence[OutputDelta], usage: Mapping[str, Any]) -> dict[str, Any]:
        """Body of the response without streaming, from all deltas of the answer."""
        for delta in deltas:
            self._add(delta)
        return self._response(usage)

    def opening(self) -> list[bytes]:
        """First events of a stream."""
        kinds = "created", "in_progress"
        return [self._event(kind, response=self._response()) for kind in kinds]

    def chunks(self, delta: OutputDelta) -> list[bytes]:
        """Events of a stream for one delta; calls come whole, at the end."""
        item = {"item_id": self._message_id, "output_index": 0, "content_index": 0}
        events = []
        if delta.text and not self._text:
            empty = {**self._message(), "status": "in_progress", "content": []}
            events.append(self._event("output_item.added", output_index=0, item=empty))
            events.append(self._event("content_part.added", **item, part=_text_part("")))
        self._add(delta)
        if delta.text:
            more = {"delta": delta.text, "logprobs": []}
            events.append(self._event("output_text.delta", **item, **more))
        if delta.finish_reason and self._text:
            text, part = {"text": self._text, "logprobs": []}, _text_part(self._text)
            events.append(self._event("output_text.done", **item, **text))
            events.append(self._event("content_part.done", **item, part=part))
        for index, output in enumerate(self._output() if delta.finish_reason else ()):
            place = {"item_id": output["id"], "output_index": index}
            if call := output.get("arguments"):
                empty = {**output, "status": "in_progress", "arguments": ""}
                events.append(self._event("output_item.added", output_index=index, item=empty))
                events.append(self._event("function_call_arguments.delta", **place, delta=call))
                done = {**place, "arguments": call}
                events.append(self._event("function_call_arguments.done", **done))
            events.append(self._event("output_item.done", output_index=index, item=output))
        return events

    def closing(self, usage: Mapping[str, Any]) -> list[bytes]:
        """Last event of a stream."""
        response = self._response(usage)
        return [self._event(response["status"], response=response)]

    def _add(self, delta: OutputDelta) -> None:
        self._text += delta.text
        self._calls += delta.calls
        self._reason = delta.finish_reason or self._reason

    def _message(self) -> dict[str, Any]:
        message = {"id": self._message_id, "type": "message", "role": "assistant"}
        return {**message, "status": "completed", "content": [_text_part(self._text)]}

    def _output(self) -> list[dict[str, Any]]:
        """The items of the answer."""
        calls = [
            {"type": "function_call", "id": f"fc_{call['id']}", "call_id": call["id"]}
            | {"status": "completed", **call["function"]}
            for call in self._calls
        ]
        return [self._message(), *calls] if self._text or not calls else calls

    def _response(self, usage: Mapping[str, Any] | None = None) -> dict[str, Any]:
        cut = self._reason == "length"
        state: dict[str, Any] = {"status": "in_progress", "output": [], "usage": None}
        if usage is not None:
            tokens = {"total_tokens": usage["total_tokens"]}
            for ours, name in (("prompt", "input"), ("completion", "output")):
                tokens[f"{name}_tokens"] = usage[f"{ours}_tokens"]
            tokens["input_tokens_details"] = usage["prompt_tokens_details"]
            tokens["output_tokens_details"] = {"reasoning_tokens": 0}
            ended = "incomplete" if cut else "completed"
            state = {"status": ended, "output": self._output(), "usage": tokens}
        return {
            **self._head,
            **state,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "rap": self._plans.report() | {"ignored": self._request.ignored},
        }

    def _event(self, kind: str, **content: Any) -> bytes:
        named = {"type": f"response.{kind}", "sequence_number": self._events, **content}
        self._events += 1
        return f"event: response.{kind}\n".encode() + event(named)


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
