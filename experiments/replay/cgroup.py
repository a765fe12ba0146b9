"""``python -m experiments.replay.cgroup``: `rap serve` beside a tenant in a real memory cgroup.

A parent group has the limit. In it, a tenant's memory walks at random, a step each second, and
clients ask the server for one streamed answer after another. The kernel kills where the group
exceeds its limit. What happened is recorded and drawn: memory, levels of caches, tokens.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import TYPE_CHECKING, Any

from experiments.config import Config
from experiments.launch import launch
from experiments.study.console import say
from experiments.study.figures import INK, save_png, style
from experiments.study.run_folder import provenance
from rap_env.artifacts import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ROOT = Path("/sys/fs/cgroup/memory")
_MIB = 2**20
_SAMPLE_S = 0.5
_STEP_MIB = 60  # of the tenant's walk
_START_S = 120.0
_PALE = "#ccd0d6"
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
        """Start a process in a group of its own."""
        group = self._folder / name
        group.mkdir()
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


@dataclass
class Answer:
    """One answer: when it was asked for, when its pieces came, and how it ended.

    Attributes:
        asked_s: Seconds since the start.
        times_s: When each piece of text came.
        tokens: Tokens of the answer, as the server counts them.
        error: Why it failed; None if it is complete.
    """

    asked_s: float
    times_s: list[float] = field(default_factory=list)
    tokens: int = 0
    error: str | None = None


@dataclass
class Trial:
    """A recorded run. Times are in seconds since the start.

    Attributes:
        settings: The limit, the tenant's bytes, minutes and clients.
        kills: Processes that the kernel killed.
        answers: All answers.
        samples: For each moment the time, resident bytes of tenant and server, and metrics of the
            server: its budget, native caches of the plan, running and waiting answers, rows whose
            caches are lower than the plan's, preemptions, and tokens read, read again, refilled and
            generated.
    """

    settings: dict[str, Any]
    kills: int = 0
    answers: list[Answer] = field(default_factory=list)
    samples: list[list[float]] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def longest_silence_s(self) -> float:
        """Longest time without a piece of any answer while one was open."""
        moves = sorted(
            time_s for answer in self.answers for time_s in (answer.asked_s, *answer.times_s)
        )
        return max((b - a for a, b in itertools.pairwise(moves)), default=0.0)

    @property
    def recoveries_s(self) -> list[float]:
        """After each return of the plan to native caches: until a tenth of the rows is lower."""
        recoveries, since_s, native = [], None, max((row[4] for row in self.samples), default=0)
        before = native
        for row in self.samples:
            if row[4] < native:
                since_s = None
            elif before < native:
                since_s = row[0]
            if since_s is not None and row[7] <= 0.1 * row[5]:
                recoveries.append(row[0] - since_s)
                since_s = None
            before = row[4]
        return recoveries

    @property
    def summary(self) -> str:
        """The run in sentences."""
        failed = sum(answer.error is not None for answer in self.answers)
        gaps = [b - a for each in self.answers for a, b in itertools.pairwise(each.times_s)]
        *_, preemptions, read, again, _, _ = self.samples[-1] if self.samples else [0.0] * 5
        back, share = self.recoveries_s, 100 * again / max(1, read)
        return (
            f"{len(self.answers) - failed} of {len(self.answers)} requests answered, "
            f"{self.kills} processes killed, longest time without a token "
            f"{self.longest_silence_s:.1f} s; between the pieces of an answer "
            f"{1000 * statistics.median(gaps or [0]):.0f} ms (median); {share:.1f} % of the prompt "
            f"tokens were read again after {preemptions:.0f} preemptions. Native caches came back "
            f"{len(back)} times, in all rows after {statistics.median(back or [0]):.1f} s (median, "
            f"at most {max(back, default=0):.1f} s)."
        )


_METRICS = (
    "rap_memory_budget_bytes", 'rap_items{kind="cache",level="native"}', "rap_running",
    "rap_queue_length", "rap_lowered_rows", "rap_preemptions_total",
    'rap_tokens_total{part="prompt"}', 'rap_tokens_total{part="repeated"}',
    'rap_tokens_total{part="refilled"}', 'rap_tokens_total{part="generated"}',
)  # fmt: skip


class _Run:
    """The processes and threads of a trial."""

    def __init__(self, settings: dict[str, Any], group: MemoryGroup, port: int, seed: int) -> None:
        self.trial = Trial(settings)
        self._group, self._port, self._seed = group, port, seed
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
            answer = Answer(self._now_s())
            self.trial.answers.append(answer)
            try:
                self._read(answer, body)
            except Exception as error:
                answer.error = repr(error)
                time.sleep(1)

    def _read(self, answer: Answer, body: dict[str, Any]) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=300)
        with contextlib.closing(connection):
            connection.request(
                "POST",
                "/v1/chat/completions",
                json.dumps(body),
                {"content-type": "application/json"},
            )
            response = connection.getresponse()
            if response.status != 200:
                raise RuntimeError(f"{response.status}: {response.read(300)!r}")
            for line in response:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line.removeprefix(b"data: "))
                if "error" in event:
                    raise RuntimeError(str(event["error"]))
                if event["choices"]:
                    answer.times_s.append(round(self._now_s(), 3))
                answer.tokens = (event.get("usage") or {}).get("completion_tokens", answer.tokens)

    def _sample(self) -> None:
        while not self._stop.wait(_SAMPLE_S):
            with contextlib.suppress(OSError, http.client.HTTPException):
                values = scraped(self._port)
                resident = [self._group.resident_bytes(name) for name in ("tenant", "server")]
                row = [
                    round(self._now_s(), 2),
                    *resident,
                    *(values.get(name, 0.0) for name in _METRICS),
                ]
                self.trial.samples.append(row)


def scraped(port: int) -> dict[str, float]:
    """The metrics of a server, by name with labels."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    with contextlib.closing(connection):
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    lines = re.findall(r"^(rap_[^ ]+) ([^ ]+)$", text, re.MULTILINE)
    return {name: float(value) for name, value in lines}


@contextlib.contextmanager
def _process(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """End a process, and wait for it, at the end of a block."""
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def run_trial(config: Config, folder: Path, group: MemoryGroup) -> Trial:
    """Start server and tenant in a group, run the trial, and end both."""
    settings, port = {"model": config.model.name, **config.cgroup}, _free_port()
    code = "import sys; from rap_env.cli import main; sys.exit(main())"
    serve = [sys.executable, "-c", code, "serve", "--model", config.model.name, "--port", str(port),
             "--decisions", str(folder / "decisions.jsonl"), "--threads", "1"]  # fmt: skip
    with contextlib.ExitStack() as stack:
        stack.callback(group.close)
        log = stack.enter_context((folder / "server.log").open("w", encoding="utf-8"))
        server = stack.enter_context(_process(group.start("server", serve, stdout=log, stderr=log)))
        tenant = [sys.executable, "-c", _TENANT]
        beside = stack.enter_context(_process(group.start("tenant", tenant, stdin=subprocess.PIPE)))
        began_s = time.monotonic()
        while time.monotonic() - began_s < _START_S and server.poll() is None:
            with contextlib.suppress(OSError):
                if scraped(port).get("rap_ready"):
                    break
            time.sleep(0.2)
        trial = _Run(settings, group, port, config.seed).run(beside)
    trial.provenance = provenance({"run": config.seed})
    return trial


def trial_figure(trial: Trial) -> Figure:
    """Memory against the limit, levels of caches, and tokens a second, over time."""
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(9, 6), layout="constrained")
        memory, levels, tokens = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1.5, 1.5))
        _draw_memory(memory, trial)
        times = [row[0] for row in trial.samples]
        native = max(row[4] for row in trial.samples)
        levels.fill_between(
            times,
            [100 * row[4] / native for row in trial.samples],
            color=_PALE,
            step="post",
            label="plan",
        )
        share = [100 * (1 - row[7] / row[5]) if row[5] else 100.0 for row in trial.samples]
        levels.plot(times, share, color=INK, lw=0.8, label="answers at the plan's levels")
        levels.set(ylabel="native caches, %", ylim=(0, 105))
        levels.legend(loc="lower right", fontsize=7)
        pairs = list(zip(trial.samples, trial.samples[10:], strict=False))
        rates = [(b[12] - a[12]) / (b[0] - a[0]) for a, b in pairs]
        tokens.plot([b[0] for _, b in pairs], rates, color=INK, lw=0.8)
        tokens.set(ylabel="tokens a second", xlabel="seconds", ylim=(0, None))
        return figure


def _draw_memory(axes: Axes, trial: Trial) -> None:
    times, limit = [row[0] for row in trial.samples], trial.settings["limit_mib"]
    tenant, server = ([row[column] / _MIB for row in trial.samples] for column in (1, 2))
    axes.stackplot(times, tenant, server, colors=(_PALE, "#4c78a8"), labels=("tenant", "rap serve"))
    axes.axhline(limit, color="#b03a2e", lw=1.2, label=f"limit of the cgroup, {limit} MiB")
    axes.set(ylabel="resident memory, MiB", ylim=(0, 1.08 * limit))
    axes.legend(loc="upper right", fontsize=7, ncols=3)


def trial(config: Config, folder: Path) -> None:
    """Run the trial, and write its record, figure and a summary; skip it without cgroups."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        group = MemoryGroup(config.cgroup["limit_mib"] * _MIB)
    except OSError as error:
        say(f"Skipped: no memory cgroup of version 1 can be made here ({error}); run it as root.")
        return
    run = run_trial(config, folder, group)
    with atomic_write(folder / "cgroup.json") as file:
        file.write(json.dumps(asdict(run)).encode())
    save_png(trial_figure(run), folder / "cgroup.png")
    say(f"{run.summary}\n{folder / 'cgroup.png'}")


if __name__ == "__main__":
    launch("cgroup", trial)
