"""The command `llm`, with a model of its file of OpenAI-compatible ones."""

import json
import os
import subprocess
import sys
from pathlib import Path

URL, QUESTION = sys.argv[1], "What is the capital of France?"
os.environ["LLM_USER_PATH"] = str(Path.cwd())
Path("extra-openai-models.yaml").write_text(
    f'- {{model_id: rap, model_name: rap, api_base: "{URL}", supports_schema: true}}\n'
)


def ask(*arguments: str) -> str:
    """What the command prints."""
    command = [Path(sys.executable).with_name("llm"), "-m", "rap", "--key", "none", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


chat, stream, formed = (
    ask("--no-stream", QUESTION),
    ask(QUESTION),
    ask("--schema", "name, country", QUESTION),
)
print(json.dumps({"chat": chat, "stream": stream, "structured": json.loads(formed)["name"]}))
