"""The OpenAI client: chats, and a stream of the newer API."""

import openai
from asked import CHAT, QUESTION, SERVER, City, show

client = openai.OpenAI(**SERVER)
tools = [openai.pydantic_function_tool(City)]
stream = client.responses.create(model="any", input=QUESTION, stream=True)
called = client.chat.completions.create(**CHAT, tools=tools, tool_choice="required").choices[0]
show(
    chat=client.chat.completions.create(**CHAT).choices[0].message.content,
    stream="".join(event.delta for event in stream if event.type.endswith("text.delta")),
    structured=client.chat.completions.parse(**CHAT, response_format=City)
    .choices[0]
    .message.parsed.name,
    tools=called.message.tool_calls[0].function.arguments,
)
