"""Well-known clients, each in an environment of its own, against `rap serve` as it is.

``make clients`` runs them. The page "Clients" has the same versions and what each answered.
"""

import json
import os
import socket
import subprocess
import sys
import time
import venv
from pathlib import Path

import httpx
import pytest

CLIENTS = {
    "openai": ("openai==3.57.0", "chat stream structured tools"),
    "litellm": ("litellm==1.110.2", "chat stream structured tools"),
    "langchain": ("langchain-openai==1.8.1", "chat stream structured tools"),
    "pydantic_ai": ("pydantic-ai-slim[openai]==2.68.0", "chat stream structured"),
    "instructor": ("instructor==1.17.0", "structured"),
    "openai_agents": ("openai-agents==0.24.0", "chat stream structured tools"),
    "llm": ("llm==0.36", "chat stream structured"),
    "guidellm": ("guidellm==0.8.1", "stream"),
}
"""The package of each client, and what its program tries; by the beginning of its file's name."""
PROGRAMS = Path(__file__).parent / "programs"


def test_the_page_has_each_client_with_its_version():
    page = (Path(__file__).parents[2] / "docs" / "clients.md").read_text(encoding="utf-8")
    for package, kinds in CLIENTS.values():
        name, _, version = package.partition("==")
        marks = [
            "yes" if kind in kinds else "no" for kind in ("chat", "stream", "structured", "tools")
        ]
        assert f"| `{name.partition('[')[0]}` {version} | {' | '.join(marks)} |" in page


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The base URL of a server of the default model, and its folder."""
    folder = tmp_path_factory.mktemp("clients")
    environment = {**os.environ, "RAP_CACHE_DIR": str(folder / "cache")}
    rap = [sys.executable, "-m", "rap_env.cli"]
    subprocess.run([*rap, "fetch"], check=True, env=environment)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen([*rap, "serve", "--port", str(port)], env=environment) as process:
        try:
            for _ in range(300):
                time.sleep(0.2)
                try:
                    if httpx.get(f"{url}/readyz").is_success:
                        break
                except httpx.TransportError:
                    assert process.poll() is None
            (model,) = (folder / "cache" / "models").glob("gguf-*-packed-*")
            yield f"{url}/v1", model
        finally:
            process.terminate()


@pytest.mark.network
@pytest.mark.parametrize("name", CLIENTS)
def test_a_client_works_in_its_default_mode(server, name, tmp_path):
    package, kinds = CLIENTS[name]
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    quiet = ["-q", "--disable-pip-version-check", "--no-compile"]
    subprocess.run([python, "-m", "pip", "install", *quiet, package], check=True)
    program = PROGRAMS / f"{name}_client.py"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run(
        [python, program, *map(str, server)],
        cwd=tmp_path, env=environment, check=True, stdout=subprocess.PIPE, text=True, timeout=300,
    )  # fmt: skip
    answers = json.loads(run.stdout.splitlines()[-1])
    assert [*answers] == kinds.split()
    assert all(text.strip() for text in answers.values()), answers
