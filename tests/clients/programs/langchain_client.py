"""LangChain's client of OpenAI's API."""

import json
import sys

from langchain_openai import ChatOpenAI
from pydantic import BaseModel


class City(BaseModel):
    """A city."""

    name: str


model = ChatOpenAI(base_url=sys.argv[1], api_key="none", model="any")
calling = model.bind_tools([City], tool_choice="any")
question = "What is the capital of France?"
print(json.dumps({
    "chat": model.invoke(question).content,
    "stream": "".join(chunk.content for chunk in model.stream(question)),
    "structured": model.with_structured_output(City).invoke(question).name,
    "tools": calling.invoke(question).tool_calls[0]["args"]["name"],
}))  # fmt: skip
