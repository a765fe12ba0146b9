"""OpenAI's Agents SDK in its default mode, the newer API."""

import asyncio

from asked import QUESTION, SERVER, City, show
from openai import AsyncOpenAI

import agents


@agents.function_tool
def weather(city: str) -> str:
    """The weather in a city."""
    return f"It is sunny in {city}."


async def ask() -> None:
    """Show the answers of each kind."""
    agents.set_default_openai_client(AsyncOpenAI(**SERVER), use_for_tracing=False)
    agents.set_tracing_disabled(True)
    greedy = agents.ModelSettings(temperature=0)  # a small model may write without end
    plain = agents.Agent(name="agent", model="any", model_settings=greedy)
    formed = plain.clone(output_type=City)
    must = agents.ModelSettings(temperature=0, tool_choice="required")
    calling = plain.clone(
        tools=[weather], model_settings=must, tool_use_behavior="stop_on_first_tool"
    )
    streamed = agents.Runner.run_streamed(plain, QUESTION)
    async for _ in streamed.stream_events():
        pass
    show(
        chat=(await agents.Runner.run(plain, QUESTION)).final_output,
        stream=streamed.final_output,
        structured=(await agents.Runner.run(formed, QUESTION)).final_output.name,
        tools=(await agents.Runner.run(calling, "The weather in Rome?")).final_output,
    )


asyncio.run(ask())
