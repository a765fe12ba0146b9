"""``python -m experiments.replay.cgroup``: a server beside a tenant in a real memory cgroup.

A parent group has the limit. In it, a tenant's memory walks at random, a step each second, and
clients ask the server for one streamed answer after another. The kernel kills where the group
exceeds its limit; a server that has ended starts again. What happened is recorded and drawn:
memory, levels of caches, tokens. The servers are `rap serve`, llama.cpp's with an f16 cache for as
many answers as there are clients, and ``transformers serve`` with weights in bfloat16.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from experiments.config import Config
from experiments.launch import launch
from experiments.llama_cpp import gguf_file
from experiments.replay.trial import SYSTEMS, Answer, Trial, trial_figure, trial_table
from experiments.study.console import say
from experiments.study.experiment_errors import ExperimentError
from experiments.study.plotting import save_png
from experiments.study.run_folder import provenance
from rap_env.errors import UnknownNameError
from rap_env.models.files.sources import locate

_ROOT = Path("/sys/fs/cgroup/memory")
_MIB = 2**20
_SAMPLE_S = 0.5
_STEP_MIB = 60  # of the tenant's walk
_START_S = 300.0
_ROW_TOKENS = 1024  # of an answer with its prompt, for llama.cpp
_TENANT = """
import mmap, sys
blocks, private = [], mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
for line in sys.stdin:
    while len(blocks) < int(line):
        blocks.append(mmap.mmap(-1, 2**20, flags=private))
        blocks[-1].write(bytes(2**20))
    while len(blocks) > int(line):
        blocks.pop().close()
"""
"""A process that holds as many MiB as the last line of its standard input says."""


class MemoryGroup:
    """A memory control group (version 1) with a limit, and groups in it that share the limit.

    Raises:
        OSError: None can be made here.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._folder = _ROOT / f"rap-{os.getpid()}"
        self._folder.mkdir()
        try:
            (self._folder / "memory.use_hierarchy").write_text("1")
            (self._folder / "memory.limit_in_bytes").write_text(str(limit_bytes))
        except OSError:
            self._folder.rmdir()
            raise

    def start(self, name: str, command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        """Start a process in a group of its own, or in the same one again."""
        group = self._folder / name
        group.mkdir(exist_ok=True)
        line = 'echo $$ > "$0"/cgroup.procs && exec "$@"'
        return subprocess.Popen(["sh", "-c", line, str(group), *command], text=True, **options)

    def resident_bytes(self, name: str = "") -> int:
        """Bytes of memory of all processes of a group that are not file cache."""
        return _counter(self._folder / name / "memory.stat", "total_rss")

    @property
    def kills(self) -> int:
        """Processes that the kernel has killed."""
        files = self._folder.rglob("memory.oom_control")
        return sum(_counter(file, "oom_kill") for file in files)

    def close(self) -> None:
        """Remove the groups; their processes must have ended."""
        for folder in [*self._folder.iterdir(), self._folder]:
            if folder.is_dir():
                folder.rmdir()


def _counter(file: Path, name: str) -> int:
    counters = dict(line.split() for line in file.read_text(encoding="ascii").splitlines())
    return int(counters.get(name, 0))


_METRICS = (
    "rap_memory_budget_bytes", 'rap_items{kind="cache",level="native"}', "rap_running",
    "rap_queue_length", "rap_lowered_rows", "rap_preemptions_total",
    'rap_tokens_total{part="prompt"}', 'rap_tokens_total{part="repeated"}',
    'rap_tokens_total{part="refilled"}', 'rap_tokens_total{part="generated"}',
)  # fmt: skip


class _Run:
    """The processes and threads of a trial."""

    def __init__(
        self, settings: dict[str, Any], group: MemoryGroup, server: _Server, seed: int
    ) -> None:
        self.trial = Trial(settings)
        self._group, self._server, self._port, self._seed = group, server, server.port, seed
        self._began_s, self._stop = time.monotonic(), threading.Event()

    def run(self, tenant: subprocess.Popen[str]) -> Trial:
        """Send requests and move the tenant's memory until the time is over."""
        settings, draw = self.trial.settings, random.Random(self._seed)
        clients = [
            threading.Thread(target=self._ask, args=(number,), daemon=True)
            for number in range(settings["clients"])
        ]
        for thread in (*clients, threading.Thread(target=self._sample, daemon=True)):
            thread.start()
        least, most = settings["tenant_mib"]
        size = least
        while self._now_s() < 60 * settings["minutes"] and tenant.poll() is None:
            size = min(most, max(least, size + draw.randint(-_STEP_MIB, _STEP_MIB)))
            assert tenant.stdin is not None
            tenant.stdin.write(f"{size}\n")
            tenant.stdin.flush()
            self._server.start_again()
            time.sleep(1)
        self._stop.set()
        for thread in clients:
            thread.join(timeout=120)
        self.trial.kills = self._group.kills
        return self.trial

    def _now_s(self) -> float:
        return time.monotonic() - self._began_s

    def _ask(self, client: int) -> None:
        draw = random.Random(f"{self._seed} {client}")
        texts = sorted(topics.values(), key=len)[-40:]
        while not self._stop.is_set():
            text = draw.choice(texts)
            start = draw.randrange(len(text) // 2)
            body = {
                "model": self.trial.settings["model"], "max_tokens": 128,
                "stream": True, "stream_options": {"include_usage": True},
                "temperature": 0.8, "seed": draw.randrange(1000),
                "messages": [{"role": "user", "content": "Explain: " + text[start : start + 1600]}],
            }  # fmt: skip
            if self.trial.settings["system"] == "transformers":
                del body["model"]  # its name would be a path
            answer = Answer(self._now_s())
            self.trial.answers.append(answer)
            try:
                self._read(answer, body)
            except Exception as error:
                answer.error = repr(error)
                time.sleep(1)
            if answer.error and "Connection refused" in answer.error:  # the server starts again
                self.trial.answers.remove(answer)

    def _read(self, answer: Answer, body: dict[str, Any]) -> None:
        with _opened(self._port, "/v1/chat/completions", body, timeout_s=300) as response:
            for line in response:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line.removeprefix(b"data: "))
                if "error" in event:
                    raise RuntimeError(str(event["error"]))
                if event["choices"]:
                    answer.times_s.append(round(self._now_s(), 3))
                answer.tokens = (event.get("usage") or {}).get("completion_tokens", answer.tokens)
                answer.delta_nll = (event.get("rap") or {}).get("delta_nll", answer.delta_nll)
            if not answer.tokens:  # they are counted at the end
                raise RuntimeError(f"{response.status}: the answer has no end")

    def _sample(self) -> None:
        while not self._stop.wait(_SAMPLE_S):
            values = scraped(self._port)
            resident = [self._group.resident_bytes(name) for name in ("tenant", "server")]
            metrics = (values.get(name, 0.0) for name in _METRICS)
            self.trial.samples.append([round(self._now_s(), 2), *resident, *metrics])


def scraped(port: int) -> dict[str, float]:
    """The metrics of a server, by name with labels; none of one that does not answer."""
    try:
        with _opened(port, "/metrics") as response:
            text = response.read().decode()
    except (OSError, http.client.HTTPException):
        return {}
    lines = re.findall(r"^(rap_[^ ]+) ([^ ]+)$", text, re.MULTILINE)
    return {name: float(value) for name, value in lines}


def _opened(
    port: int, path: str, body: dict[str, Any] | None = None, timeout_s: float = 10
) -> http.client.HTTPResponse:
    """The response of a server to a request, which is a POST if it has a body."""
    content = None if body is None else json.dumps(body).encode()
    url, headers = f"http://127.0.0.1:{port}{path}", {"content-type": "application/json"}
    request = urllib.request.Request(url, content, headers)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is on this machine
    response: http.client.HTTPResponse = direct.open(request, timeout=timeout_s)
    return response


class _Server:
    """A server in a group."""

    def __init__(self, group: MemoryGroup, command: list[str], port: int, log: Any) -> None:
        self.port = port
        self._start = partial(group.start, "server", command, stdout=log, stderr=log)
        self.process = self._start()

    def wait_until_ready(self) -> None:
        """Wait until it answers.

        Raises:
            ExperimentError: It has ended, or does not answer in time.
        """
        began_s = time.monotonic()
        while time.monotonic() - began_s < _START_S and self.process.poll() is None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                _opened(self.port, "/health").close()
                return
            time.sleep(0.2)
        raise ExperimentError(f"The server did not start within {_START_S:g} s; see its log.")

    def start_again(self) -> None:
        """Start it again if it has ended."""
        if self.process.poll() is not None:
            self.process = self._start()


def command_of(system: str, config: Config, port: int, folder: Path) -> list[str]:
    """The command that starts a server."""
    settings, name, at = config.cgroup, config.model.name, ["--port", str(port)]
    match system:
        case "rap":
            code = "import sys; from rap_env.cli import main; sys.exit(main())"
            decisions = str(folder / "decisions.jsonl")
            return [sys.executable, "-c", code, "serve", "--model", name, *at, "--threads", "1",
                    "--decisions", decisions]  # fmt: skip
        case "llama.cpp":
            rows = settings["clients"]
            return [settings["llama_server"], "-m", str(gguf_file(name)), *at, "-np", str(rows),
                    "-c", str(rows * _ROW_TOKENS), "-t", "1", "-cram", "0"]  # fmt: skip
        case "transformers":
            program = str(Path(sys.executable).with_name("transformers"))
            return [program, "serve", str(locate(name).folder), *at, "--device", "cpu",
                    "--dtype", "bfloat16", "--model-timeout", "-1"]  # fmt: skip
    raise UnknownNameError("system", system, SYSTEMS)


def _end(process: subprocess.Popen[str]) -> None:
    """End a process, and wait for it."""
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(30)
    process.kill()
    process.wait()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def run_trial(system: str, config: Config, folder: Path, group: MemoryGroup) -> Trial:
    """Start a server and the tenant in a group, run the trial, and end both."""
    settings, port = config.cgroup | {"model": config.model.name, "system": system}, _free_port()
    del settings["llama_server"]  # a path
    command = command_of(system, config, port, folder)
    with contextlib.ExitStack() as stack:
        stack.callback(group.close)
        log = stack.enter_context((folder / f"{system}.log").open("w", encoding="utf-8"))
        server = _Server(group, command, port, log)
        stack.callback(lambda: _end(server.process))
        tenant = [sys.executable, "-c", _TENANT]
        beside = group.start("tenant", tenant, stdin=subprocess.PIPE)
        stack.callback(_end, beside)
        server.wait_until_ready()
        trial = _Run(settings, group, server, config.seed).run(beside)
    trial.provenance = provenance({"run": config.seed})
    return trial


def trial(config: Config, folder: Path) -> None:
    """Run the trial with each system, and write records, a figure and a table."""
    folder.mkdir(parents=True, exist_ok=True)
    trials = {}
    for system in config.cgroup["systems"]:
        try:
            group = MemoryGroup(config.cgroup["limit_mib"] * _MIB)
        except OSError as error:
            say(f"Skipped: no memory cgroup of version 1 can be made here ({error}); be root.")
            return
        trials[system] = run_trial(system, config, folder, group)
        trials[system].write(folder / f"{system}.json.gz")
    if "rap" in trials:
        save_png(trial_figure(trials["rap"]), folder / "cgroup.png")
    say(f"{trial_table(trials)}\n{folder}")


if __name__ == "__main__":
    launch("cgroup", trial)
