"""LiteLLM, with the prefix by which it knows a server of OpenAI's API."""

import json
import sys

import litellm
from pydantic import BaseModel


class City(BaseModel):
    """A city."""

    name: str


asked = {"model": "openai/any", "base_url": sys.argv[1], "api_key": "none",
         "messages": [{"role": "user", "content": "What is the capital of France?"}]}  # fmt: skip
answer = litellm.completion(**asked)
chunks = [
    chunk.choices[0].delta.content or "" for chunk in litellm.completion(**asked, stream=True)
]
formed = litellm.completion(**asked, response_format=City).choices[0].message.content
tool = {"name": "city", "parameters": City.model_json_schema()}
tools = [{"type": "function", "function": tool}]
called = litellm.completion(**asked, tools=tools, tool_choice="required").choices[0].message
print(json.dumps({
    "chat": answer.choices[0].message.content,
    "stream": "".join(chunks),
    "structured": City.model_validate_json(formed).name,
    "tools": json.loads(called.tool_calls[0].function.arguments)["name"],
}))  # fmt: skip
