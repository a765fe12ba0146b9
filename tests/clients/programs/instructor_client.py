"""Instructor in its default mode, by a tool that must be called."""

import instructor
import openai
from asked import CHAT, SERVER, City, show

client = instructor.from_openai(openai.OpenAI(**SERVER))
show(structured=client.chat.completions.create(**CHAT, response_model=City).name)
