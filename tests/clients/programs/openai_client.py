"""The OpenAI client: chats, and the newer API, which shares its stream and tools."""

import json
import sys

import openai
from pydantic import BaseModel


class City(BaseModel):
    """A city."""

    name: str
    country: str


client = openai.OpenAI(base_url=sys.argv[1], api_key="none")
asked = {
    "model": "any",
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
}
tools = [openai.pydantic_function_tool(City)]
stream = client.responses.create(model="any", input=question, stream=True)
parsed = client.chat.completions.parse(**asked, response_format=City).choices[0].message.parsed
called = client.chat.completions.create(**asked, tools=tools, tool_choice="required").choices[0]
print(json.dumps({
    "chat": client.chat.completions.create(**asked).choices[0].message.content,
    "stream": "".join(event.delta for event in stream if event.type.endswith("text.delta")),
    "structured": parsed.name,
    "tools": json.loads(called.message.tool_calls[0].function.arguments)["name"],
}))  # fmt: skip
