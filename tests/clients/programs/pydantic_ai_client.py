"""Pydantic AI, whose structured output is a tool that must be called."""

import asyncio

from asked import QUESTION, SERVER, City, show
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

model = OpenAIChatModel("any", provider=OpenAIProvider(**SERVER))


async def ask() -> None:
    """Show the answers of each kind."""
    async with Agent(model).run_stream(QUESTION) as stream:
        text = "".join([piece async for piece in stream.stream_text(delta=True)])
    formed = (await Agent(model, output_type=City).run(QUESTION)).output
    show(chat=(await Agent(model).run(QUESTION)).output, stream=text, structured=formed.name)


asyncio.run(ask())
