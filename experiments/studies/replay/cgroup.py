"""``python -m experiments.studies.replay.cgroup``: servers beside a tenant in a memory cgroup.

A group has a memory limit. In it, a tenant's memory walks at random, a step each second, and
clients ask the server for one streamed answer after another. The kernel kills where the group
exceeds its limit; a server that has ended starts again. The servers are `rap serve`, llama.cpp's
with an f16 cache for as many answers as there are clients, and ``transformers serve`` with weights
in bfloat16.
"""

from __future__ import annotations

import contextlib
import itertools
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
from functools import cached_property, partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import numpy.typing as npt

from experiments.config import Config
from experiments.launch import launch
from experiments.study.console import ExperimentError
from experiments.study.harness import Job, Published, Study, untitled
from experiments.study.json_records import Record
from experiments.study.plotting import Panel, panel_figure
from experiments.study.table_format import TitledTable
from rap_env.errors import UnknownNameError
from rap_env.models.files.sources import gguf_source, locate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SYSTEMS = {
    "rap": "rap serve",
    "llama.cpp": "llama.cpp's server, f16 cache",
    "transformers": "transformers serve, bfloat16",
}
"""Servers that the trial starts, with their names in tables."""

METRICS = {
    "budget_bytes": "rap_memory_budget_bytes",
    "native": 'rap_items{kind="cache",level="native"}',
    "running": "rap_running",
    "lowered": "rap_lowered_rows",
    "preemptions": "rap_preemptions_total",
    "read": 'rap_tokens_total{part="prompt"}',
    "read_again": 'rap_tokens_total{part="repeated"}',
    "generated": 'rap_tokens_total{part="generated"}',
}
"""What a sample holds of the metrics of `rap serve`, with their names there."""

_ROOT = Path("/sys/fs/cgroup/memory")
_MIB = 2**20
_SAMPLE_S = 0.5
_STEP_MIB = 60  # of the tenant's walk
_START_S = 300.0
_ROW_TOKENS = 1024  # of an answer with its prompt, for llama.cpp
_CALM_S = 5.0  # of native caches, after which times between tokens count as undisturbed
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

Series = npt.NDArray[np.float64]


@dataclass(frozen=True)
class TrialRow(Record):
    """The trial of one server. Times are in seconds since its start.

    Attributes:
        system: The server, as in `SYSTEMS`.
        kills: Processes that the kernel killed.
        answers: For each answer when it was asked for (``asked_s``), when its pieces came
            (``times_s``), its ``tokens`` as the server counts them, why it failed (``error``, None
            if it is complete), and the predicted rise in NLL of its plan (``delta_nll``, nats per
            token).
        samples: Twice a second the time, resident bytes of tenant and server, and `METRICS`.
    """

    file = "cgroup.jsonl"
    record_name = "A trial in a cgroup"
    identity = ("system",)

    system: str
    kills: int
    answers: list[dict[str, Any]]
    samples: list[list[float]]

    @cached_property
    def series(self) -> dict[str, Series]:
        """Each value of the samples over time, (samples,)."""
        names = ("time_s", "tenant_bytes", "server_bytes", *METRICS)
        return dict(zip(names, np.array(self.samples, dtype=float).T, strict=True))

    @cached_property
    def gaps(self) -> Series:
        """Times between two pieces of an answer: its request, begin and end, (3, gaps)."""
        gaps = [
            (answer["asked_s"], *gap_s)
            for answer in self.answers
            for gap_s in itertools.pairwise(answer["times_s"])
        ]
        return np.array(gaps, dtype=float).reshape(-1, 3).T


def measures(trial: TrialRow) -> dict[str, str]:
    """What a trial measures, in words."""
    minutes, (_, begins, ends) = trial.series["time_s"][-1] / 60, trial.gaps
    answered = [answer for answer in trial.answers if answer["error"] is None]
    tokens = sum(answer["tokens"] for answer in trial.answers)
    moves = sorted(time_s for a in trial.answers for time_s in (a["asked_s"], *a["times_s"]))
    values = {
        "Minutes": f"{minutes:.1f}",
        "Requests answered": f"{len(answered)}",
        "Requests failed": f"{len(trial.answers) - len(answered)}",
        "Processes killed, and started again": f"{trial.kills}",
        "Tokens a second": f"{tokens / minutes / 60:.1f}",
        "Longest time without a token": f"{max(np.diff(moves), default=0):.1f} s",
        "Time between the pieces of an answer, median": f"{1000 * _median(ends - begins):.0f} ms",
    }
    if answered:
        delta_nll = np.mean([answer["delta_nll"] or 0 for answer in answered])
        values["ΔNLL of the answers' plans, mean"] = f"{delta_nll:.3f}"
    return values | measures_of_returns(trial)


def measures_of_returns(trial: TrialRow) -> dict[str, str]:
    """How soon all is as before after each return of memory, in words; nothing without a return.

    Memory is back when the budget reaches nine tenths of what it is when the plan has native caches
    again, and does not fall below that in between. Rows are back when a tenth of them at most is
    lower than the plan. The rate is that of the median time between pieces that end within the next
    second, and is back within 10 % of the undisturbed one: that while plan and rows have had native
    caches for `_CALM_S`.
    """
    series, (asked, begins, ends) = trial.series, trial.gaps
    times_s, budget, lowered = series["time_s"], series["budget_bytes"], series["lowered"]
    native, gaps_s = series["native"] == series["native"].max(), ends - begins
    calm = np.zeros(len(gaps_s), dtype=bool)
    for span in spans(native & (lowered == 0)):
        first_s, last_s = times_s[span][0] + _CALM_S, times_s[span][-1]
        calm |= (first_s <= begins) & (begins < ends) & (ends <= last_s)
    returns = [span for span in spans(native) if span.start]
    row_s: list[float] = []
    rate_s: list[float] = []
    alive = [np.array([])]  # times between pieces of answers that were asked for before
    for span in returns:
        less = native | (budget < 0.9 * budget[span.start])
        back_s = times_s[max(np.flatnonzero(less[: span.start]), default=-1) + 1]
        last_s = times_s[span][-1]
        restored_s = times_s[span][lowered[span] <= 0.1 * series["running"][span]]
        row_s += (restored_s[:1] - back_s).tolist()
        within = (back_s <= begins) & (begins < ends) & (ends <= last_s)
        alive.append(gaps_s[within & (asked < back_s)])
        for tenth in range(round(10 * back_s), round(10 * last_s)):
            second = gaps_s[(tenth <= 10 * ends) & (10 * ends < tenth + 10)]
            if second.size and np.median(second) <= 1.1 * _median(gaps_s[calm]):
                rate_s.append(tenth / 10 - back_s)
                break
    if not returns:
        return {}
    slowdown = np.concatenate(alive).mean() / gaps_s[calm].mean()
    last = {name: values[-1] for name, values in series.items()}
    return {
        "Preemptions": f"{last['preemptions']:.0f}",
        "Prompt tokens read again": f"{100 * last['read_again'] / max(1, last['read']):.1f} %",
        "Returns of memory": f"{len(returns)}",
        "After a return: until all rows have native caches": _times(row_s),
        "until tokens come at the undisturbed rate": _times(rate_s),
        "time per token of answers alive then": f"{slowdown:.2f} times undisturbed",
    }


def spans(flags: npt.NDArray[np.bool_]) -> list[slice]:
    """The runs of true values."""
    edges = np.flatnonzero(np.diff(flags, prepend=False, append=False)).tolist()
    return [slice(first, end) for first, end in zip(edges[::2], edges[1::2], strict=True)]


def _median(values: Sequence[float] | Series) -> float:
    return float(np.median(values)) if len(values) else 0.0


def _times(seconds: list[float]) -> str:
    most = max(seconds, default=0)
    return f"{_median(seconds):.1f} s (median of {len(seconds)}, at most {most:.1f} s)"


def trial_tables(rows: Sequence[TrialRow]) -> list[TitledTable]:
    """What each server did, a column for each."""
    columns = [measures(row) for row in rows]
    names = dict.fromkeys(name for column in columns for name in column)
    lines = [[name, *(column.get(name, "-") for column in columns)] for name in names]
    return [TitledTable((["", *(SYSTEMS[row.system] for row in rows)], lines))]


def trial_figure(rows: Sequence[TrialRow]) -> Figure:
    """Memory against the limit, levels of caches, and tokens a second, of the first server."""
    trial, series = rows[0], rows[0].series
    times_s, limit = series["time_s"], trial.depends_on["limit_mib"]

    def memory(axes: Axes) -> None:
        resident = [series[name] / _MIB for name in ("tenant_bytes", "server_bytes")]
        labels = ("tenant", SYSTEMS[trial.system])
        axes.stackplot(times_s, resident, colors=("#ccd0d6", "#4c78a8"), labels=labels)
        axes.axhline(limit, color="#b03a2e", label=f"limit of the cgroup, {limit} MiB")
        axes.set_ylim(0, 1.25 * limit)
        axes.legend(loc="upper right", ncols=3)

    def caches(axes: Axes) -> None:
        plan = 100 * series["native"] / max(1, *series["native"])
        axes.fill_between(times_s, plan, color="#ccd0d6", step="post", label="plan")
        rows_at_plan = 100 * (1 - series["lowered"] / np.maximum(1, series["running"]))
        axes.plot(times_s, rows_at_plan, linewidth=0.8, label="answers at the plan's levels")
        axes.legend(loc="lower right", frameon=True)

    def speed(axes: Axes) -> None:
        rate = np.diff(series["generated"][::10]) / np.diff(times_s[::10])
        axes.plot(times_s[10::10], rate, linewidth=0.8)

    panels = [
        Panel(memory, y="resident memory, MiB"),
        Panel(caches, y="native caches, %"),
        Panel(speed, x="seconds", y="tokens a second"),
    ]
    return panel_figure(panels, columns=1, height=2.2, legend=0, sharex=True)


@contextlib.contextmanager
def memory_group(limit_bytes: int) -> Iterator[Path]:
    """A memory control group (version 1) with a limit, and in it the groups of two processes.

    Raises:
        ExperimentError: None can be made here.
    """
    group = _ROOT / f"rap-{os.getpid()}"
    parts = [group / "server", group / "tenant"]
    try:
        group.mkdir()
        (group / "memory.use_hierarchy").write_text("1")
        (group / "memory.limit_in_bytes").write_text(str(limit_bytes))
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


def counter(file: Path, name: str) -> int:
    """A counter in a file of a group."""
    counters = dict(line.split() for line in file.read_text(encoding="ascii").splitlines())
    return int(counters.get(name, 0))


def command_of(system: str, config: Config, port: int) -> list[str]:
    """The command that starts a server.

    Raises:
        UnknownNameError: There is no such server.
        ExperimentError: llama.cpp cannot read the model.
    """
    settings, name, at = config.cgroup, config.model.name, ["--port", str(port)]
    if system == "rap":
        code = "import sys; from rap_env.cli import main; sys.exit(main())"
        return [sys.executable, "-c", code, "serve", "--model", name, *at, "--threads", "1"]
    if system == "transformers":
        program = str(Path(sys.executable).with_name("transformers"))
        options = ["--device", "cpu", "--dtype", "bfloat16", "--model-timeout", "-1"]
        return [program, "serve", str(locate(name).folder), *at, *options]
    if system != "llama.cpp":
        raise UnknownNameError("system", system, SYSTEMS)
    if (file := gguf_source(name)) is None:
        raise ExperimentError(f"llama.cpp reads a GGUF file, and {name} comes from none.")
    rows = settings.clients
    options = ["-np", str(rows), "-c", str(rows * _ROW_TOKENS), "-t", "1", "-cram", "0"]
    return [settings.llama_server, "-m", str(file), *at, *options]


class TrialRun:
    """A server in a group, and the clients that ask it.

    Attributes:
        answers: As `TrialRow.answers`; `samples` as `TrialRow.samples`.
        server: The process of the server.
    """

    def __init__(self, system: str, config: Config, group: Path, log: Any) -> None:
        self.answers: list[dict[str, Any]] = []
        self.samples: list[list[float]] = []
        self._settings, self._seed, self._group = config.cgroup, config.seed, group
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False)
        self._model = {} if system == "transformers" else {"model": config.model.name}
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

    def run(self, tenant: subprocess.Popen[str]) -> None:
        """Send requests and move the tenant's memory until the time is over."""
        settings, draw = self._settings, random.Random(self._seed)
        self._began_s = time.monotonic()
        threads = [threading.Thread(target=self._sample, daemon=True)]
        for client in range(settings.clients):
            threads.append(threading.Thread(target=self._ask, args=(client,), daemon=True))
        for thread in threads:
            thread.start()
        least, most = settings.tenant_mib
        size = least
        while self._now_s() < 60 * settings.minutes and tenant.poll() is None:
            size = min(most, max(least, size + draw.randint(-_STEP_MIB, _STEP_MIB)))
            print(size, file=tenant.stdin, flush=True)
            if self.server.poll() is not None:
                self.server = self._start()
            time.sleep(1)
        self._stop.set()
        for thread in threads:
            thread.join(timeout=120)

    def _now_s(self) -> float:
        return time.monotonic() - self._began_s

    def _ask(self, client: int) -> None:
        draw = random.Random(f"{self._seed} {client}")
        texts = sorted(topics.values(), key=len)[-40:]
        while not self._stop.is_set():
            text = draw.choice(texts)
            start = draw.randrange(len(text) // 2)
            prompt = "Explain: " + text[start : start + 1600]
            body = {
                **self._model,
                **{"max_tokens": 128, "temperature": 0.8, "seed": draw.randrange(1000)},
                **{"stream": True, "stream_options": {"include_usage": True}},
                "messages": [{"role": "user", "content": prompt}],
            }
            now_s = self._now_s()
            answer = {"asked_s": now_s, "times_s": [], "tokens": 0, "error": None, "delta_nll": 0.0}
            self.answers.append(answer)
            try:
                self._read(answer, body)
            except httpx.ConnectError:  # the server starts again
                self.answers.remove(answer)
                time.sleep(1)
            except Exception as error:
                answer["error"] = repr(error)
                time.sleep(1)

    def _read(self, answer: dict[str, Any], body: dict[str, Any]) -> None:
        path = "/v1/chat/completions"
        with self._http.stream("POST", path, json=body, timeout=300) as response:
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise RuntimeError(str(event["error"]))
                if event["choices"]:
                    answer["times_s"].append(round(self._now_s(), 3))
                if event.get("usage"):
                    answer["tokens"] = event["usage"]["completion_tokens"]
                answer["delta_nll"] = (event.get("rap") or {}).get("delta_nll", answer["delta_nll"])
            if not answer["tokens"]:  # they are counted at the end
                raise RuntimeError(f"{response.status_code}: the answer has no end")

    def _sample(self) -> None:
        while not self._stop.wait(_SAMPLE_S):
            parts = (self._group / name / "memory.stat" for name in ("tenant", "server"))
            resident = [counter(part, "total_rss") for part in parts]
            text = ""
            with contextlib.suppress(httpx.HTTPError):
                text = self._http.get("/metrics", timeout=10).text
            values = dict(re.findall(r"^(rap_[^ ]+) ([^ ]+)$", text, re.MULTILINE))
            metrics = (float(values.get(name, 0)) for name in METRICS.values())
            self.samples.append([round(self._now_s(), 2), *resident, *metrics])


def run_trial(system: str, config: Config, folder: Path) -> TrialRow:
    """Start a server and the tenant in a group, run the trial, and end both."""
    log_file = folder / f"{system}.log"
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(log_file.open("w", encoding="utf-8"))
        group = stack.enter_context(memory_group(config.cgroup.limit_mib * _MIB))
        trial = TrialRun(system, config, group, log)
        stack.callback(lambda: ended(trial.server))
        tenant = started(group / "tenant", [sys.executable, "-c", _TENANT], stdin=subprocess.PIPE)
        stack.callback(ended, tenant)
        trial.wait_until_ready()
        trial.run(tenant)
        kills = sum(counter(file, "oom_kill") for file in group.rglob("memory.oom_control"))
    return TrialRow(system, kills, trial.answers, trial.samples)


def trial_jobs(config: Config, folder: Path) -> Iterator[Job[TrialRow]]:
    """Yield the trial of each server."""
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs each request
    names = ("limit_mib", "tenant_mib", "minutes", "clients")
    settings = {name: getattr(config.cgroup, name) for name in names}
    depends_on = {"model": config.model.name, **settings}
    for system in config.cgroup.systems:
        yield Job(TrialRow, (system,), depends_on, partial(run_trial, system, config, folder))


STUDY = Study(
    "cgroup",
    "In a memory cgroup",
    [TrialRow],
    trial_jobs,
    trial_tables,
    figures={"cgroup": trial_figure},
    frozen=("model", "cgroup.limit_mib", "cgroup.tenant_mib", "cgroup.minutes", "cgroup.clients"),
    published=[Published("cgroup", "cgroup", untitled)],
)

if __name__ == "__main__":
    launch(STUDY.name, STUDY.run)
