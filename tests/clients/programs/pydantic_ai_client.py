"""Pydantic AI, whose structured output is a tool that must be called."""

import asyncio
import json
import sys

from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


class City(BaseModel):
    """A city."""

    name: str


model = OpenAIChatModel("any", provider=OpenAIProvider(base_url=sys.argv[1], api_key="none"))
question = "What is the capital of France?"


async def answers() -> dict[str, str]:
    """The answers of each kind."""
    async with Agent(model).run_stream(question) as stream:
        text = "".join([piece async for piece in stream.stream_text(delta=True)])
    formed = (await Agent(model, output_type=City).run(question)).output
    chat = (await Agent(model).run(question)).output
    return {"chat": chat, "stream": text, "structured": formed.name}


print(json.dumps(asyncio.run(answers())))
