"""OpenAI's newer API, ``POST /v1/responses``, as chats: its body, and its answers."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, ValidationError

from rap_env.serving.answers import AnswerPlans
from rap_env.serving.generation import OutputDelta
from rap_env.serving.http import invalid, shown
from rap_env.serving.prompts import GenerationRequest
from rap_env.serving.responses import event
from rap_env.serving.schemas import ChatCompletionRequest, SamplingFields, first_error


class ResponsesRequest(SamplingFields):
    """Body of ``POST /v1/responses``."""

    input: str | list[dict[str, Any]]
    """A text, or items: messages, `function_call` and `function_call_output`."""
    instructions: str | None = None
    """What the system says before them."""
    max_output_tokens: int | None = Field(None, ge=-1)
    """As `max_tokens` of a chat."""
    tools: list[dict[str, Any]] | None = None
    """Functions: `type`, `name`, `description`, `parameters`, `strict`."""
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    """As of a chat."""
    parallel_tool_calls: bool | None = None
    """As of a chat."""
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
            "max_tokens": self.max_output_tokens,
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
        params = request.params
        self._head = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            **dict.fromkeys(("error", "instructions", "previous_response_id")),
            "metadata": {},
            "temperature": params.temperature,
            "top_p": params.top_p,
            "max_output_tokens": params.max_new_tokens,
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
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
        response = self._response()
        return [self._event(f"response.{name}", response=response) for name in _OPENING]

    def chunks(self, delta: OutputDelta) -> list[bytes]:
        """Events of a stream for one delta; calls come whole, at the end."""
        begins = bool(delta.text) and not self._text
        self._add(delta)
        inside = {"item_id": self._message_id, "output_index": 0, "content_index": 0}
        events = []
        if begins:
            empty = {**self._message(), "status": "in_progress", "content": []}
            events = [
                self._event("response.output_item.added", output_index=0, item=empty),
                self._event("response.content_part.added", **inside, part=_text_part("")),
            ]
        if delta.text:
            more = {**inside, "delta": delta.text, "logprobs": []}
            events.append(self._event("response.output_text.delta", **more))
        if not delta.finish_reason:
            return events
        if self._text:
            done = {**inside, "text": self._text, "logprobs": []}
            part = _text_part(self._text)
            events.append(self._event("response.output_text.done", **done))
            events.append(self._event("response.content_part.done", **inside, part=part))
        for index, item in enumerate(self._output()):
            if item["type"] == "function_call":
                empty = {**item, "status": "in_progress", "arguments": ""}
                place = {"item_id": item["id"], "output_index": index}
                arguments, kind = item["arguments"], "response.function_call_arguments"
                events += [
                    self._event("response.output_item.added", output_index=index, item=empty),
                    self._event(f"{kind}.delta", **place, delta=arguments),
                    self._event(f"{kind}.done", **place, arguments=arguments, name=item["name"]),
                ]
            events.append(self._event("response.output_item.done", output_index=index, item=item))
        return events

    def closing(self, usage: Mapping[str, Any]) -> list[bytes]:
        """Last event of a stream."""
        response = self._response(usage)
        return [self._event(f"response.{response['status']}", response=response)]

    def _add(self, delta: OutputDelta) -> None:
        self._text += delta.text
        self._calls += delta.calls
        self._reason = delta.finish_reason or self._reason

    def _message(self) -> dict[str, Any]:
        content = [_text_part(self._text)]
        state = {"type": "message", "role": "assistant", "status": "completed"}
        return {"id": self._message_id, **state, "content": content}

    def _output(self) -> list[dict[str, Any]]:
        """The items of the answer."""
        calls = [
            {
                "type": "function_call",
                "id": f"fc_{call['id']}",
                "call_id": call["id"],
                "status": "completed",
                **call["function"],
            }
            for call in self._calls
        ]
        return [self._message(), *calls] if self._text or not calls else calls

    def _response(self, usage: Mapping[str, Any] | None = None) -> dict[str, Any]:
        cut = self._reason == "length"
        ended = "incomplete" if cut else "completed"
        return {
            **self._head,
            "status": "in_progress" if usage is None else ended,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": [] if usage is None else self._output(),
            "usage": usage
            and {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": usage["prompt_tokens_details"],
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            },
            "rap": self._plans.report() | {"ignored": self._request.ignored},
        }

    def _event(self, kind: str, **content: Any) -> bytes:
        self._events += 1
        named = {"type": kind, "sequence_number": self._events - 1, **content}
        return f"event: {kind}\n".encode() + event(named)


_OPENING = ("created", "in_progress")


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
