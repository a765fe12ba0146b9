"""LiteLLM, with the prefix by which it knows a server of OpenAI's API."""

import litellm
from asked import CHAT, SERVER, City, show

asked = {**CHAT, **SERVER, "model": "openai/any"}
function = {"name": "city", "parameters": City.model_json_schema()}
needed = {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}
chunks = litellm.completion(**asked, stream=True)
formed = litellm.completion(**asked, response_format=City).choices[0].message.content
show(
    chat=litellm.completion(**asked).choices[0].message.content,
    stream="".join(chunk.choices[0].delta.content or "" for chunk in chunks),
    structured=City.model_validate_json(formed).name,
    tools=litellm.completion(**asked, **needed).choices[0].message.tool_calls[0].function.arguments,
)
