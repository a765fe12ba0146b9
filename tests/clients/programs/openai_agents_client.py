"""OpenAI's Agents SDK in its default mode, the newer API."""

import asyncio
import json
import sys

from openai import AsyncOpenAI
from pydantic import BaseModel

from agents import (
    Agent,
    ModelSettings,
    Runner,
    function_tool,
    set_default_openai_client,
    set_tracing_disabled,
)


class City(BaseModel):
    """A city."""

    name: str


@function_tool
def weather(city: str) -> str:
    """The weather in a city."""
    return f"It is sunny in {city}."


async def answers() -> dict[str, str]:
    """The answers of each kind."""
    client = AsyncOpenAI(base_url=sys.argv[1], api_key="none")
    set_default_openai_client(client, use_for_tracing=False)
    set_tracing_disabled(True)
    question, plain = "What is the capital of France?", Agent(name="plain", model="any")
    formed = Agent(name="formed", model="any", output_type=City)
    must = ModelSettings(tool_choice="required")
    calling = Agent(name="calling", model="any", tools=[weather], model_settings=must,
                    tool_use_behavior="stop_on_first_tool")  # fmt: skip
    streamed = Runner.run_streamed(plain, question)
    async for _ in streamed.stream_events():
        pass
    return {
        "chat": (await Runner.run(plain, question)).final_output,
        "stream": streamed.final_output,
        "structured": (await Runner.run(formed, question)).final_output.name,
        "tools": (await Runner.run(calling, "The weather in Rome?")).final_output,
    }


print(json.dumps(asyncio.run(answers())))
