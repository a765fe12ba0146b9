"""What all clients are asked, and how they show what they got."""

import json
import sys

from pydantic import BaseModel

URL, QUESTION = sys.argv[1], "What is the capital of France?"
SERVER = {"base_url": URL, "api_key": "none"}
CHAT = {"model": "any", "messages": [{"role": "user", "content": QUESTION}]}


class City(BaseModel):
    """A city."""

    name: str


def show(**answers: str) -> None:
    """Print the answers of each kind."""
    print(json.dumps(answers))
