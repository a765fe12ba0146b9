"""Instructor in its default mode, by a tool that must be called."""

import json
import sys

import instructor
import openai
from pydantic import BaseModel


class City(BaseModel):
    """A city."""

    name: str


client = instructor.from_openai(openai.OpenAI(base_url=sys.argv[1], api_key="none"))
messages = [{"role": "user", "content": "What is the capital of France?"}]
city = client.chat.completions.create(model="any", messages=messages, response_model=City)
print(json.dumps({"structured": city.name}))
