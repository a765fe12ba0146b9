"""Servers that a program starts and asks over HTTP: `rap serve`, and that of llama.cpp."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from experiments.study.console import ExperimentError
from rap_env.models.files.sources import gguf_source

_START_S = 300.0
_RAP = (sys.executable, "-c", "import sys; from rap_env.cli import main; sys.exit(main())")


def rap_command(model: str, *options: str) -> list[str]:
    """The command of `rap serve` with one thread."""
    return [*_RAP, "serve", "--model", model, "--threads", "1", *options]


def llama_command(program: str, model: str, *options: str) -> list[str]:
    """The command of llama.cpp's server with one thread.

    Raises:
        ExperimentError: llama.cpp cannot read the model.
    """
    if (file := gguf_source(model)) is None:
        raise ExperimentError(f"llama.cpp reads a GGUF file, and {model} comes from none.")
    return [program, "-m", str(file), "-t", "1", *options]


class Server:
    """A server in a process of its own.

    Args:
        command: Its command, to which its port is added.
        log: Where its output goes; by default to that of this process.

    Attributes:
        process: The process.
    """

    def __init__(self, command: Sequence[str], log: Any = None) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        anew = httpx.Limits(max_keepalive_connections=0)  # llama.cpp's server closes those
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, limits=anew)
        line = [*command, "--port", str(port)]
        self._start = partial(subprocess.Popen, line, stdout=log, stderr=log)
        self.process = self._start()

    @property
    def proc(self) -> Path:
        """Where the kernel reports on the process."""
        return Path("/proc", str(self.process.pid))

    def cpu_s(self) -> float:
        """Seconds of CPU time that the process has taken."""
        numbers = (self.proc / "stat").read_text().rpartition(")")[2].split()
        return (int(numbers[11]) + int(numbers[12])) / os.sysconf("SC_CLK_TCK")

    def start_again(self) -> None:
        """Start it again if it has ended."""
        if self.process.poll() is not None:
            self.process = self._start()

    def wait_until_ready(self) -> None:
        """Wait until the server answers.

        Raises:
            ExperimentError: It has ended, or does not answer in time.
        """
        deadline_s = time.monotonic() + _START_S
        while time.monotonic() < deadline_s and self.process.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                if self._http.get("/health").is_success:
                    return
            time.sleep(0.2)
        raise ExperimentError(f"The server did not start within {_START_S:g} s; see its log.")

    def chat(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a streamed chat answer; raises as `stream`."""
        return self.stream("chat/completions", body)

    def stream(self, kind: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a streamed answer.

        Args:
            kind: ``"completions"`` or ``"chat/completions"``.
            body: The request.

        Raises:
            httpx.HTTPError: The connection cannot be made, or breaks.
            RuntimeError: The server reports an error, or tells no number of tokens at the end.
        """
        body = body | {"stream": True, "stream_options": {"include_usage": True}}
        counted = False
        with self._http.stream("POST", f"/v1/{kind}", json=body, timeout=300) as response:
            if response.is_error:
                raise RuntimeError(response.read().decode())
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise RuntimeError(str(event["error"]))
                    counted = counted or bool(event.get("usage"))
                    yield event
            if not counted:
                raise RuntimeError(f"{response.status_code}: the answer has no end")

    def close(self) -> None:
        """End the process, and wait for it."""
        end_process(self.process)


def end_process(process: subprocess.Popen[Any]) -> None:
    """End a process, and wait for it."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(30)
    process.kill()
    process.wait()


def piece(event: dict[str, Any]) -> str:
    """The text of an event of a streamed answer."""
    choices = event["choices"]
    if not choices:
        return ""
    return choices[0].get("text") or choices[0].get("delta", {}).get("content") or ""
