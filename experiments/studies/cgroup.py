"""``python -m experiments.studies.cgroup``: servers beside a tenant in a memory cgroup.

A group has a memory limit. In it, a tenant's memory walks at random, a step each second, and
clients ask the server for one streamed answer after another, in conversations of
``cgroup.turns`` turns. The kernel kills where the group exceeds its limit; a server that has
ended starts again. The servers are `rap serve`, with and without keeping what was read, and
that of llama.cpp with an f16 cache for as many answers as there are clients.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import random
import re
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
import pandas as pd

from experiments.config import Config
from experiments.launch import launch
from experiments.study.console import ExperimentError
from experiments.study.harness import Job, Study
from experiments.study.json_records import Record
from experiments.study.servers import Server, end_process, llama_command, piece, rap_command
from experiments.study.table_format import TitledTable, percent

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
    times_s = sorted(time_s for answer in trial.answers for time_s in answer["times_s"])
    ends_s = [(a["times_s"][0], a["times_s"][-1]) for a in trial.answers if a["times_s"]]
    pauses = sorted(itertools.pairwise(times_s), key=lambda pause: pause[0] - pause[1])
    under_way_s = (
        end - begin
        for begin, end in pauses  # the longest one first
        if any(first <= begin and end <= last for first, last in ends_s)
    )
    values = {
        "Minutes": f"{trial.minutes:.1f}",
        "Requests answered": f"{len(answered)}",
        "Requests failed": f"{len(trial.answers) - len(answered)}",
        "Processes killed, and started again": f"{trial.kills}",
        "Tokens a second": f"{tokens / trial.minutes / 60:.1f}",
        "Longest time without a token": f"{max(np.diff(moves), default=0):.1f} s",
        "Longest time without a token, an answer under way": f"{next(under_way_s, 0):.1f} s",
        "Longest time between the pieces of an answer": f"{max(gaps_s, default=0):.1f} s",
        "Time between the pieces of an answer, median": f"{gap_ms:.0f} ms",
    }
    if answered:
        delta_nll = np.mean([answer["delta_nll"] or 0 for answer in answered])
        values["ΔNLL of the answers' plans, mean"] = f"{delta_nll:.3f}"
    turns = [answer for answer in answered if answer.get("turn")]
    if turns:
        kept = sum(a["kept_tokens"] for a in turns) / sum(a["prompt_tokens"] for a in turns)
        kept_clause, read_clause = ", most of the prompt kept", ", most of the prompt read again"
        first_s: dict[str, list[float]] = {"": [], kept_clause: [], read_clause: []}
        for answer in turns:
            most = answer["kept_tokens"] > answer["prompt_tokens"] / 2
            wait_s = answer["times_s"][0] - answer["asked_s"]
            first_s[""].append(wait_s)
            first_s[kept_clause if most else read_clause].append(wait_s)
        for how, waits_s in first_s.items():
            middle = f"{np.median(waits_s):.1f} s ({len(waits_s)})" if waits_s else "-"
            values[f"First token of later turns{how}: median (turns)"] = middle
        values["Prompt tokens of later turns that were kept"] = percent(kept)
        for took, words in ((True, "took"), (False, "took no")):
            rises = [a["delta_nll"] or 0 for a in answered if bool(a["kept_tokens"]) == took]
            mean = f"{np.mean(rises):.3f} ({len(rises)})" if rises else "-"
            values[f"ΔNLL of answers that {words} kept tokens, mean (answers)"] = mean
    return values


def trial_tables(rows: Sequence[TrialRow]) -> list[TitledTable]:
    """What each server did, a column for each."""
    table = pd.DataFrame({SYSTEMS[row.system]: measures(row) for row in rows}).fillna("-")
    return [TitledTable(table.rename_axis("").reset_index())]


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


def inside(group: Path, command: Sequence[str]) -> list[str]:
    """The command that starts another one in a group."""
    return ["sh", "-c", 'echo $$ > "$0"/cgroup.procs && exec "$@"', str(group), *command]


def command_of(system: str, config: Config) -> list[str]:
    """The command that starts a server, but for its port.

    Raises:
        ExperimentError: llama.cpp cannot read the model.
    """
    if system != "llama.cpp":
        keep = "off" if system == "rap_keep_off" else "on"
        return rap_command(config.model.name, "--keep", keep)
    row_tokens = _ROW_TOKENS + _TURN_TOKENS * (config.cgroup.turns - 1)
    rows = ["-np", str(_CLIENTS), "-c", str(_CLIENTS * row_tokens)]
    return llama_command(config.cgroup.llama_server, config.model.name, *rows, "-cram", "0")


class TrialRun:
    """The clients that ask a server in a group.

    Attributes:
        answers: As `TrialRow.answers`.
    """

    def __init__(self, server: Server, config: Config) -> None:
        self.answers: list[dict[str, Any]] = []
        self._server = server
        self._seed, self._model, self._turns = config.seed, config.model.name, config.cgroup.turns
        self._began_s, self._stop = 0.0, threading.Event()

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
            self._server.start_again()
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
        text = ""
        for event in self._server.chat(body):
            if event["choices"]:
                answer["times_s"].append(round(self._now_s(), 3))
                text += piece(event)
            if usage := event.get("usage"):
                answer["tokens"] = usage["completion_tokens"]
                if "turn" in answer:
                    details = usage.get("prompt_tokens_details") or {}
                    answer["prompt_tokens"] = usage["prompt_tokens"]
                    answer["kept_tokens"] = details.get("cached_tokens", 0)
            answer["delta_nll"] = (event.get("rap") or {}).get("delta_nll", answer["delta_nll"])
        return text


def run_trial(system: str, config: Config, folder: Path) -> TrialRow:
    """Start a server and the tenant in a group, run the trial, and end both."""
    log_file = folder / f"{system}.log"
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(log_file.open("w", encoding="utf-8"))
        group = stack.enter_context(memory_group())
        server = Server(inside(group / "server", command_of(system, config)), log)
        stack.callback(server.close)
        command = inside(group / "tenant", [sys.executable, "-c", _TENANT])
        tenant = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)
        stack.callback(end_process, tenant)
        server.wait_until_ready()
        trial = TrialRun(server, config)
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
)

if __name__ == "__main__":
    launch(STUDY.name, STUDY.run)
