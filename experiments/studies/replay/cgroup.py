"""``python -m experiments.studies.replay.cgroup``: servers beside a tenant in a memory cgroup.

A group has a memory limit. In it, a tenant's memory walks at random, a step each second, and
clients ask the server for one streamed answer after another, in conversations of
``cgroup.turns`` turns. The kernel kills where the group exceeds its limit; a server that has
ended starts again. The servers are `rap serve`, with and without keeping what was read, and
that of llama.cpp with an f16 cache for as many answers as there are clients.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import httpx
import numpy as np

from experiments.config import Config
from experiments.launch import launch
from experiments.study.console import ExperimentError
from experiments.study.harness import Job, Published, Study, untitled
from experiments.study.json_records import Record
from experiments.study.table_format import TitledTable, percent
from rap_env.models.files.sources import gguf_source

SYSTEMS = {
    "rap": "rap serve",
    "rap_keep_off": "rap serve --keep off",
    "llama.cpp": "llama.cpp's server, f16 cache",
    "transformers": "transformers serve, bfloat16",
}
"""Names of servers in tables, also of one that only the committed record has."""

_ROOT = Path("/sys/fs/cgroup/memory")
_LIMIT_MIB = 760
_TENANT_MIB, _STEP_MIB = (50, 280), 60  # least, most and largest step of the tenant's walk
_CLIENTS = 3
_START_S = 300.0
_ROW_TOKENS = 1024  # of an answer with its prompt, for llama.cpp
_TURN_TOKENS = 256  # more of them for each later turn
_PROMPT_CHARACTERS, _LATER_CHARACTERS = 1600, 400  # of the first message and of later ones
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


@dataclass(frozen=True)
class TrialRow(Record):
    """The trial of one server. Times are in seconds since its start.

    Attributes:
        system: The server, as in `SYSTEMS`.
        kills: Processes that the kernel killed.
        answers: For each answer when it was asked for (``asked_s``), when its pieces came
            (``times_s``), its ``tokens`` as the server counts them, why it failed (``error``,
            None if it is complete), and the predicted rise in NLL of its plan (``delta_nll``,
            nats per token); in conversations also its ``turn``, from 0, the tokens of its
            prompt (``prompt_tokens``), and those of them that were kept (``kept_tokens``).
        minutes: How long the trial lasted.
    """

    file = "cgroup.jsonl"
    record_name = "A trial in a cgroup"
    identity = ("system",)

    system: str
    kills: int
    answers: list[dict[str, Any]]
    minutes: float


def measures(trial: TrialRow) -> dict[str, str]:
    """What a trial measures, in words."""
    answered = [answer for answer in trial.answers if answer["error"] is None]
    tokens = sum(answer["tokens"] for answer in trial.answers)
    moves = sorted(time_s for a in trial.answers for time_s in (a["asked_s"], *a["times_s"]))
    gaps_s = [gap_s for answer in trial.answers for gap_s in np.diff(answer["times_s"])]
    gap_ms = 1000 * np.median(gaps_s) if gaps_s else 0
    values = {
        "Minutes": f"{trial.minutes:.1f}",
        "Requests answered": f"{len(answered)}",
        "Requests failed": f"{len(trial.answers) - len(answered)}",
        "Processes killed, and started again": f"{trial.kills}",
        "Tokens a second": f"{tokens / trial.minutes / 60:.1f}",
        "Longest time without a token": f"{max(np.diff(moves), default=0):.1f} s",
        "Time between the pieces of an answer, median": f"{gap_ms:.0f} ms",
    }
    if answered:
        delta_nll = np.mean([answer["delta_nll"] or 0 for answer in answered])
        values["ΔNLL of the answers' plans, mean"] = f"{delta_nll:.3f}"
    turns = [answer for answer in answered if answer.get("turn")]
    if turns:
        first_s = [answer["times_s"][0] - answer["asked_s"] for answer in turns]
        kept = sum(a["kept_tokens"] for a in turns) / sum(a["prompt_tokens"] for a in turns)
        values["First token of a later turn, median"] = f"{np.median(first_s):.2f} s"
        values["Prompt tokens of later turns that were kept"] = percent(kept)
    return values


def trial_tables(rows: Sequence[TrialRow]) -> list[TitledTable]:
    """What each server did, a column for each."""
    columns = [measures(row) for row in rows]
    names = dict.fromkeys(name for column in columns for name in column)
    lines = [[name, *(column.get(name, "-") for column in columns)] for name in names]
    return [TitledTable((["", *(SYSTEMS[row.system] for row in rows)], lines))]


@contextlib.contextmanager
def memory_group() -> Iterator[Path]:
    """A memory control group (version 1), and in it the groups of server and tenant.

    Raises:
        ExperimentError: None can be made here.
    """
    group = _ROOT / f"rap-{os.getpid()}"
    parts = [group / "server", group / "tenant"]
    try:
        group.mkdir()
        (group / "memory.use_hierarchy").write_text("1")
        (group / "memory.limit_in_bytes").write_text(str(_LIMIT_MIB * 2**20))
        for part in parts:
            part.mkdir()
    except OSError as error:
        raise ExperimentError(
            f"No memory cgroup of version 1 can be made here ({error}); be root."
        ) from None
    try:
        yield group
    finally:
        for part in [*parts, group]:
            part.rmdir()


def started(group: Path, command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
    """Start a process in a group."""
    line = 'echo $$ > "$0"/cgroup.procs && exec "$@"'
    return subprocess.Popen(["sh", "-c", line, str(group), *command], text=True, **options)


def ended(process: subprocess.Popen[str]) -> None:
    """End a process, and wait for it."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(30)
    process.kill()
    process.wait()


def command_of(system: str, config: Config, port: int) -> list[str]:
    """The command that starts a server.

    Raises:
        ExperimentError: llama.cpp cannot read the model.
    """
    name, at = config.model.name, ["--port", str(port)]
    if system != "llama.cpp":
        code = "import sys; from rap_env.cli import main; sys.exit(main())"
        options = [*at, "--threads", "1", "--keep", "off" if system == "rap_keep_off" else "on"]
        return [sys.executable, "-c", code, "serve", "--model", name, *options]
    if (file := gguf_source(name)) is None:
        raise ExperimentError(f"llama.cpp reads a GGUF file, and {name} comes from none.")
    row_tokens = _ROW_TOKENS + _TURN_TOKENS * (config.cgroup.turns - 1)
    rows = ["-np", str(_CLIENTS), "-c", str(_CLIENTS * row_tokens)]
    options = [*rows, "-t", "1", "-cram", "0"]
    return [config.cgroup.llama_server, "-m", str(file), *at, *options]


class TrialRun:
    """A server in a group, and the clients that ask it.

    Attributes:
        answers: As `TrialRow.answers`.
        server: The process of the server.
    """

    def __init__(self, system: str, config: Config, group: Path, log: Any) -> None:
        self.answers: list[dict[str, Any]] = []
        self._seed, self._model, self._turns = config.seed, config.model.name, config.cgroup.turns
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False)
        command = command_of(system, config, port)
        self._start = partial(started, group / "server", command, stdout=log, stderr=log)
        self.server = self._start()
        self._began_s, self._stop = time.monotonic(), threading.Event()

    def wait_until_ready(self) -> None:
        """Wait until the server answers.

        Raises:
            ExperimentError: It has ended, or does not answer in time.
        """
        while self._now_s() < _START_S and self.server.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                if self._http.get("/health").is_success:
                    return
            time.sleep(0.2)
        raise ExperimentError(f"The server did not start within {_START_S:g} s; see its log.")

    def run(self, tenant: subprocess.Popen[str], minutes: float) -> float:
        """Send requests and move the tenant's memory, until the time is over or the tenant killed.

        Returns:
            The minutes that it took.
        """
        draw, (least, most) = random.Random(self._seed), _TENANT_MIB
        size, self._began_s = least, time.monotonic()
        threads = [
            threading.Thread(target=self._ask, args=(client,), daemon=True)
            for client in range(_CLIENTS)
        ]
        for thread in threads:
            thread.start()
        while self._now_s() < 60 * minutes and tenant.poll() is None:
            size = min(most, max(least, size + draw.randint(-_STEP_MIB, _STEP_MIB)))
            print(size, file=tenant.stdin, flush=True)
            if self.server.poll() is not None:
                self.server = self._start()
            time.sleep(1)
        ended_s = self._now_s()
        self._stop.set()
        for thread in threads:
            thread.join(timeout=120)
        return ended_s / 60

    def _now_s(self) -> float:
        return time.monotonic() - self._began_s

    def _ask(self, client: int) -> None:
        draw = random.Random(f"{self._seed} {client}")
        texts = sorted(topics.values(), key=len)[-40:]
        messages: list[dict[str, str]] = []
        while not self._stop.is_set():
            if len(messages) >= 2 * self._turns:
                messages = []
            text = draw.choice(texts)
            start = draw.randrange(len(text) // 2)
            end = start + (_LATER_CHARACTERS if messages else _PROMPT_CHARACTERS)
            messages.append({"role": "user", "content": "Explain: " + text[start:end]})
            body = {
                "model": self._model,
                "messages": messages,
                "max_tokens": 128,
                "temperature": 0.8,
                "seed": draw.randrange(1000),
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            now_s = self._now_s()
            answer = {"asked_s": now_s, "times_s": [], "tokens": 0, "error": None, "delta_nll": 0.0}
            if self._turns > 1:
                answer |= {"turn": len(messages) // 2, "prompt_tokens": 0, "kept_tokens": 0}
            self.answers.append(answer)
            try:
                messages.append({"role": "assistant", "content": self._read(answer, body)})
                continue
            except httpx.ConnectError:  # the server starts again
                self.answers.remove(answer)
            except Exception as error:
                answer["error"] = repr(error)
            messages = []
            time.sleep(1)

    def _read(self, answer: dict[str, Any], body: dict[str, Any]) -> str:
        path, text = "/v1/chat/completions", ""
        with self._http.stream("POST", path, json=body, timeout=300) as response:
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise RuntimeError(str(event["error"]))
                if event["choices"]:
                    answer["times_s"].append(round(self._now_s(), 3))
                    text += event["choices"][0].get("delta", {}).get("content") or ""
                if usage := event.get("usage"):
                    answer["tokens"] = usage["completion_tokens"]
                    if "turn" in answer:
                        details = usage.get("prompt_tokens_details") or {}
                        answer["prompt_tokens"] = usage["prompt_tokens"]
                        answer["kept_tokens"] = details.get("cached_tokens", 0)
                answer["delta_nll"] = (event.get("rap") or {}).get("delta_nll", answer["delta_nll"])
            if not answer["tokens"]:  # they are counted at the end
                raise RuntimeError(f"{response.status_code}: the answer has no end")
        return text


def run_trial(system: str, config: Config, folder: Path) -> TrialRow:
    """Start a server and the tenant in a group, run the trial, and end both."""
    log_file = folder / f"{system}.log"
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(log_file.open("w", encoding="utf-8"))
        group = stack.enter_context(memory_group())
        trial = TrialRun(system, config, group, log)
        stack.callback(lambda: ended(trial.server))
        tenant = started(group / "tenant", [sys.executable, "-c", _TENANT], stdin=subprocess.PIPE)
        stack.callback(ended, tenant)
        trial.wait_until_ready()
        minutes = trial.run(tenant, config.cgroup.minutes)
        files = [file.read_text(encoding="ascii") for file in group.rglob("memory.oom_control")]
    kills = sum(int(count) for count in re.findall(r"^oom_kill (\d+)", "\n".join(files), re.M))
    return TrialRow(system, kills, trial.answers, minutes)


def trial_jobs(config: Config, folder: Path) -> Iterator[Job[TrialRow]]:
    """Yield the trial of each server."""
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs each request
    depends_on = {"model": config.model.name, "minutes": config.cgroup.minutes}
    if config.cgroup.turns > 1:
        depends_on["turns"] = config.cgroup.turns
    for system in config.cgroup.systems:
        yield Job(TrialRow, (system,), depends_on, partial(run_trial, system, config, folder))


STUDY = Study(
    "cgroup",
    "In a memory cgroup",
    [TrialRow],
    trial_jobs,
    trial_tables,
    frozen=("model", "cgroup.minutes", "cgroup.turns"),
    published=[Published("cgroup", "cgroup", untitled)],
)

if __name__ == "__main__":
    launch(STUDY.name, STUDY.run)
