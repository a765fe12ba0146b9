"""``python -m experiments.studies.equal_process``: `rap serve` and llama.cpp in equal memory.

Both serve one GGUF file, each in a process of its own whose resident memory is limited. `rap
serve` gets the limit; of llama.cpp's files and caches the best one takes part whose server was
within it. Files are made by llama.cpp's own programs, with an importance matrix of the file
itself. All are compared with the weights of the file in float32, on the same windows.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pandas as pd
import torch
import transformers

from experiments.config import Config
from experiments.contexts import load_text
from experiments.launch import launch
from experiments.llama_cpp import FileKind, LlamaCpp, gguf_file, make_file, need_llama_cpp
from experiments.study.console import ExperimentError
from experiments.study.harness import DeltaNLLRecord, Job, Record, Study
from experiments.study.logits import compared, logits_of, window_logits
from experiments.study.plotting import INK, Panel, panel_figure
from experiments.study.servers import Server, llama_command, piece, rap_command
from experiments.study.table_format import TitledTable, mebibytes, percent, precise
from rap_env.artifacts import atomic_write, digest
from rap_env.models.device import resident_bytes
from rap_env.models.files.loading import load_llm
from rap_env.models.live.calibration_text import calibration_windows
from rap_env.models.live.elastic import ElasticLLM
from rap_env.paths import cache_dir
from rap_env.plan import Plan
from rap_env.serving.settings import parse_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RAP, LLAMA = "rap serve", "llama.cpp"
RESTARTED, LEAST = "llama.cpp, started again", "llama.cpp, least file"
"""Ways to serve within a limit that falls, beside `RAP`: the best file for each limit, and the
file for the least limit at all of them."""
COLOURS = {RAP: "#F0001C", RESTARTED: "#2F78B9", LEAST: "#8D9299"}

_PARTS = 8  # of a window, for intervals
_SAMPLE_S = 0.1
_SPARE_TOKENS = 64  # an answer's text may be encoded in more tokens than it was generated in

CAPTION = (
    "Peak: most resident memory of the whole process, its start included; mapped: pages of files "
    "in it, which the system may take back. ΔNLL (with a 95 % interval over eighths of the text), "
    "KL divergence and the share of tokens with the same most likely one are over the weights of "
    "the file in float32. Prompt, answer: tokens per second of the process's CPU time with one "
    "thread, one server after the other. llama.cpp's files: `once`: with one copy of the "
    "vocabulary, the finer of the two; after `/` the type of the vocabulary, then that of the "
    "cache. A dash: every request is rejected."
)


@dataclass(frozen=True, kw_only=True)
class ProcessRow(DeltaNLLRecord):
    """A server, and how its model differs from the weights of the file in float32.

    Attributes:
        system: `RAP` or `LLAMA`.
        name: The limit of `RAP` as in the settings, or file and cache as in `FileKind`.
        peak_bytes: Peak resident memory of the process.
        mapped_bytes: Pages of files in its resident memory at the end.
        kl_divergence_mean: As in `rap_env.scoring.native_agreement.NativeAgreement`.
        kl_divergence_p99: See there.
        same_top_token_share: See there.
        levels: Levels of the plan with which `rap serve` answered, by item.
        beside: For `RAP` the name of llama.cpp's best row within its limit, which answered
            the same prompt just before.
        speeds: For `RAP` and, as `LLAMA`, what was beside it: tokens of the prompt and of the
            answer per second of the process's CPU time.
    """

    file = "processes.jsonl"
    identity = ("system", "name")

    system: str
    name: str
    peak_bytes: int
    mapped_bytes: int
    kl_divergence_mean: float
    kl_divergence_p99: float
    same_top_token_share: float
    levels: dict[str, str] = field(default_factory=dict)
    beside: str = ""
    speeds: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RejectedRow(Record):
    """A limit within which `rap serve` starts, but rejects the request.

    Attributes:
        limit: As in the settings.
        reason: The error that the server reports.
    """

    file = "rejected.jsonl"
    identity = ("limit",)

    limit: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class FallingRow(Record):
    """One answer while the limit falls and returns.

    Times are CPU seconds of the servers since it was asked for, so that other work on the
    machine has no effect.

    Attributes:
        system: `RAP`, `RESTARTED` or `LEAST`.
        step_s: How long each limit holds.
        limits: The limits one after the other, as in the settings.
        served: What served at each limit, as `ProcessRow.name`.
        memory: Time and resident bytes of the process, in samples.
        times_s: When each token came.
        ready_s: CPU seconds that each start under way took until the server was ready.
    """

    file = "falling.jsonl"
    identity = ("system",)

    system: str
    step_s: float
    limits: list[str]
    served: list[str]
    memory: list[list[float]]
    times_s: list[float]
    ready_s: list[float]

    @property
    def label(self) -> str:
        """What served, the number of tokens, and the longest time without one."""
        pause_s = np.diff(self.times_s).max()
        return f"{self.system}: {len(self.times_s)} tokens, longest pause {pause_s:.1f} s"


bytes_of: Callable[[str], int] = partial(parse_bytes, "A limit")


class Measuring:
    """Measures rows; files that take long to make are kept in the cache folder."""

    def __init__(self, config: Config, folder: Path) -> None:
        self._config, self._settings, self._folder = config, config.equal_process, folder
        self._source = gguf_file(config.model.name)
        self._made = cache_dir() / "equal_process" / self._source.stem
        self._made.mkdir(parents=True, exist_ok=True)

    @cached_property
    def llm(self) -> ElasticLLM:
        """The model with the levels that `rap serve` uses."""
        return load_llm(self._config.model.name, device="cpu", quick_levels=True)

    @cached_property
    def windows(self) -> torch.Tensor:
        """Token ids of the held-out text, (windows, T)."""
        return load_text(self._config.evaluate.text, "report", self.llm).tokens

    def file_row(self, name: str) -> ProcessRow:
        """Serve a file of llama.cpp, and compare its logits."""
        tokens = self.windows.shape[1]
        with self._server(self._llama(name)) as server:
            self._ask(server, self.windows[0, : tokens // 8], 2)
            memory = memory_of(server)
        engine = LlamaCpp(str(self._file(name)), FileKind.of(name).cache, 1, tokens, threads=1)
        with contextlib.closing(engine):
            quality = self._compared(partial(logits_of, engine))
        return ProcessRow(system=LLAMA, name=name, **memory, **quality)

    def limit_row(self, limit: str) -> ProcessRow:
        """Ask llama.cpp and `rap serve` within a limit, and compare the plan's logits."""
        beside = best_file(ProcessRow.read(self._folder), bytes_of(limit)).name
        tokens = self._settings.answer_tokens
        prompt = self.windows[0, :-tokens]
        with self._server(self._rap(limit)) as rap, self._server(self._llama(beside)) as llama:
            llama_speed, _ = self._ask(llama, prompt, tokens)
            speed, answer = self._ask(rap, prompt, tokens)
            memory, plan = memory_of(rap), plan_of(answer["rap"]["levels"])
        return ProcessRow(
            system=RAP,
            name=limit,
            levels=plan.levels,
            beside=beside,
            speeds={RAP: speed, LLAMA: llama_speed},
            **memory,
            **self._compared(partial(window_logits, self.llm, plan)),
        )

    def rejected_row(self, limit: str) -> RejectedRow:
        """Ask `rap serve` within a limit in which it rejects the request.

        Raises:
            ExperimentError: It answers.
        """
        tokens = self._settings.answer_tokens
        with self._server(self._rap(limit)) as server:
            try:
                self._ask(server, self.windows[0, :-tokens], tokens)
            except RuntimeError as error:
                return RejectedRow(limit=limit, reason=str(error))
        raise ExperimentError(f"rap serve answers within {limit}; it belongs to the limits.")

    def falling_row(self, system: str) -> FallingRow:
        """Generate one answer while the limit falls and returns."""
        limits, step_s = self._settings.falling, self._settings.step_s
        limit_file, rows = self._folder / "limit.txt", ProcessRow.read(self._folder)
        least = min(map(bytes_of, limits))
        served, command = limits, self._rap(limits[0], "--memory-file", str(limit_file))
        if system != RAP:
            fit = [least if system == LEAST else bytes_of(limit) for limit in limits]
            served = [best_file(rows, limit).name for limit in fit]
        prompt_tokens = self._settings.prompt_tokens
        text = self.llm.tokenizer.decode(self.windows[0, :prompt_tokens])
        run = FallingRun(text, self.windows.shape[1] - prompt_tokens - _SPARE_TOKENS)
        with contextlib.ExitStack() as stack:
            for number, limit in enumerate(limits):
                limit_file.write_text(limit)
                if number == 0 or (system != RAP and served[number] != served[number - 1]):
                    stack.close()
                    if system != RAP:
                        command = self._llama(served[number])
                    run.use(stack.enter_context(self._server(command)))
                run.sample(until_s=(number + 1) * step_s)
            run.end()
        limit_file.unlink()
        return FallingRow(
            system=system,
            step_s=step_s,
            limits=limits,
            served=served,
            memory=run.memory,
            times_s=run.times_s,
            ready_s=run.ready_s,
        )

    def _rap(self, limit: str, *options: str) -> list[str]:
        """The command of `rap serve` for one sequence, with a floor of quality that allows all."""
        tokens = str(self.windows.shape[1])
        single = ("--max-batch-size", "1", "--max-seq-len-tokens", tokens, "--keep", "off")
        serving = ("--max-delta-nll", "9", "--prepare", "off", "--memory", limit)
        return rap_command(self._config.model.name, *single, *serving, *options)

    def _llama(self, name: str) -> list[str]:
        """The command of llama.cpp's server for one sequence, with no mapped weights."""
        tokens, cache = str(self.windows.shape[1]), FileKind.of(name).cache
        single = ("-np", "1", "-c", tokens, "-cram", "0", "-ub", "64", "-lm", "none")
        caches = ("-fa", "on", "-ctk", cache, "-ctv", cache)
        program = str(Path(self._settings.programs, "llama-server"))
        return llama_command(program, str(self._file(name)), *single, *caches)

    def _file(self, name: str) -> Path:
        text = "\n\n".join(map(self.llm.tokenizer.decode, calibration_windows(self.llm)))
        programs, kind = Path(self._settings.programs), FileKind.of(name)
        return make_file(programs, self._source, kind, text, self._made)

    @contextlib.contextmanager
    def _server(self, command: Sequence[str]) -> Iterator[Server]:
        with (self._folder / "servers.log").open("a", encoding="utf-8") as log:
            server = Server(command, log)
            try:
                server.wait_until_ready()
                yield server
            finally:
                server.process.kill()  # llama.cpp's server would finish its answer
                server.close()

    def _ask(
        self, server: Server, prompt: torch.Tensor, tokens: int
    ) -> tuple[list[float], dict[str, Any]]:
        """Tokens per CPU second of prompt and answer, and what its events said last."""
        begin_s, times_s, said = server.cpu_s(), list[float](), dict[str, Any]()
        for event in server.stream("completions", completion(prompt.tolist(), tokens)):
            if piece(event) or times_s:
                times_s.append(server.cpu_s())
            said |= event
        first_s, *_, last_s = times_s
        return [len(prompt) / (first_s - begin_s), (tokens - 1) / (last_s - first_s)], said

    def _compared(self, logits: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
        reference = self._made / "reference.npy"
        if not reference.exists():
            write_logits(self._source, self.windows, reference)
        native = map(torch.from_numpy, np.load(reference, mmap_mode="c"))
        return compared(native, self.windows, logits, _PARTS)


def completion(prompt: str | list[int], tokens: int) -> dict[str, Any]:
    """The body of a request for exactly so many tokens."""
    exact = {"max_tokens": tokens, "ignore_eos": True, "temperature": 0, "cache_prompt": False}
    return {"model": "", "prompt": prompt, **exact}


class FallingRun:
    """One answer from servers that follow each other; a client asks again where one ends.

    Attributes:
        memory: As in `FallingRow`.
        times_s: See there.
        ready_s: See there.
    """

    def __init__(self, prompt: str, tokens: int) -> None:
        self._text, self._tokens = prompt, tokens
        self._ended, self._last_s = False, 0.0
        self._asking = threading.Thread(target=self._ask, daemon=True)
        self.memory: list[list[float]] = []
        self.times_s: list[float] = []
        self.ready_s: list[float] = []

    def use(self, server: Server) -> None:
        """Go on with a server that is ready; the start of the first one takes no time."""
        ready_s, is_first = server.cpu_s(), not self._asking.is_alive()
        self._serving = server, -ready_s if is_first else self._last_s
        if is_first:
            self._asking.start()
        else:
            self.ready_s.append(round(ready_s, 2))

    def sample(self, until_s: float) -> None:
        """Sample the memory of the server's process until a time, or the end of the answer."""
        process = self._serving[0].proc
        while self._now_s() < until_s and self._asking.is_alive():
            self.memory.append([self._now_s(), resident_bytes(process)[1]])
            time.sleep(_SAMPLE_S)

    def end(self) -> None:
        """Ask no more."""
        self._ended = True

    def _now_s(self) -> float:
        server, earlier_s = self._serving
        with contextlib.suppress(OSError):  # it has ended
            self._last_s = round(earlier_s + server.cpu_s(), 2)
        return self._last_s

    def _ask(self) -> None:
        while not self._ended and len(self.times_s) < self._tokens:
            body = completion(self._text, self._tokens - len(self.times_s))
            try:
                for event in self._serving[0].stream("completions", body):
                    if piece(event) and not self._ended:
                        self.times_s.append(self._now_s())
                        self._text += piece(event)
            except (httpx.HTTPError, RuntimeError):  # the next server starts
                time.sleep(_SAMPLE_S)


def memory_of(server: Server) -> dict[str, Any]:
    """Peak and mapped bytes of a server's process, as in `ProcessRow`."""
    mapped_pages = int((server.proc / "statm").read_text().split()[2])
    peak_bytes, _ = resident_bytes(server.proc)
    return {"peak_bytes": peak_bytes, "mapped_bytes": mapped_pages * mmap.PAGESIZE}


def plan_of(summary: str) -> Plan:
    """The plan that has a `Plan.summary`."""
    levels = dict[str, str]()
    for part in summary.split("; ") if summary != "native" else ():
        level, kind, *ranges = part.split()
        ends = [text.partition("-") for text in ranges]
        numbers = [n for low, _, high in ends for n in range(int(low), int(high or low) + 1)]
        items = [f"layer{number:02d}.{kind}" for number in numbers] or [kind]
        levels |= dict.fromkeys(items, level)
    return Plan.of(levels)


def best_file(rows: Sequence[ProcessRow], limit_bytes: int) -> ProcessRow:
    """llama.cpp's row with the least KL divergence whose process was within a limit.

    Args:
        rows: All rows.
        limit_bytes: The limit.

    Raises:
        ExperimentError: None was.
    """
    files = [row for row in rows if row.system == LLAMA and row.peak_bytes <= limit_bytes]
    if not files:
        raise ExperimentError(f"No file of llama.cpp was measured within {limit_bytes} bytes.")
    return min(files, key=lambda row: row.kl_divergence_mean)


def write_logits(source: Path, windows: torch.Tensor, out: Path) -> None:
    """Write the logits of a GGUF file's weights in float32, (windows, T - 1, V)."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(source.parent, gguf_file=source.name, dtype=torch.float32)
    shape = (len(windows), windows.shape[1] - 1, model.config.vocab_size)
    with torch.inference_mode(), atomic_write(out) as file:
        logits = np.lib.format.open_memmap(file.name, "w+", np.float32, shape)
        for place, window in zip(logits, windows, strict=True):
            place[:] = model(window[None, :-1]).logits[0].numpy()
        logits.flush()


def process_jobs(config: Config, folder: Path) -> Iterator[Job[Any]]:
    """Yield the rows of llama.cpp's files, of the limits, and of the limit that falls.

    Raises:
        ExperimentError: llama.cpp is not installed, or the model comes from no GGUF file.
    """
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs each request
    settings, measuring = config.equal_process, Measuring(config, folder)
    facts, windows = measuring.llm.facts, measuring.windows
    depends_on = {"model_fingerprint": facts.fingerprint, "text": digest(windows.tolist())}
    of_files = {**depends_on, "llama_cpp": need_llama_cpp()}
    for name in settings.files:
        yield Job(ProcessRow, (LLAMA, name), of_files, partial(measuring.file_row, name))
    for limit in settings.limits:
        yield Job(ProcessRow, (RAP, limit), depends_on, partial(measuring.limit_row, limit))
    for limit in settings.rejected:
        yield Job(RejectedRow, (limit,), depends_on, partial(measuring.rejected_row, limit))
    for system in (RAP, RESTARTED, LEAST) if settings.falling else ():
        schedule = {**depends_on, "limits": settings.falling, "step_s": settings.step_s}
        yield Job(FallingRow, (system,), schedule, partial(measuring.falling_row, system))


def process_tables(rows: Sequence[Record]) -> list[TitledTable]:
    """Both servers at each limit."""
    processes = [row for row in rows if isinstance(row, ProcessRow)]
    lines = list[list[str]]()
    of_rap = [row for row in processes if row.system == RAP]
    for row in sorted(of_rap, key=lambda row: -bytes_of(row.name)):
        beside = next(file for file in processes if file.name == row.beside)
        server = f"{LLAMA}: {beside.name}"
        lines.append([row.name, RAP, *process_cells(row), *speed_cells(row, RAP)])
        lines.append(["", server, *process_cells(beside), *speed_cells(row, LLAMA)])
    for rejected in (row for row in rows if isinstance(row, RejectedRow)):
        best = best_file(processes, bytes_of(rejected.limit))
        lines.append([rejected.limit, RAP, *["-"] * 7])
        lines.append(["", f"{LLAMA}: {best.name}", *process_cells(best), "-", "-"])
    quality = ("ΔNLL", "KL", "Same top token")
    header = ["Limit", "Server", "Peak", "Mapped", *quality, "Prompt", "Answer"]
    return [TitledTable(pd.DataFrame(lines, columns=header), "", CAPTION)]


def process_cells(row: ProcessRow) -> list[str]:
    """Peak, mapped pages and quality of a server."""
    return [
        mebibytes(row.peak_bytes),
        mebibytes(row.mapped_bytes),
        precise(row.estimate),
        f"{row.kl_divergence_mean:.4f}",
        percent(row.same_top_token_share),
    ]


def speed_cells(row: ProcessRow, system: str) -> list[str]:
    """Speeds of one of the servers at a limit."""
    return [f"{speed:.1f}" for speed in row.speeds[system]]


def process_figure(rows: Sequence[Record]) -> Figure:
    """Draw tokens and memory while the limit falls and returns."""
    falling = [row for row in rows if isinstance(row, FallingRow)]

    def draw_tokens(axis: Axes) -> None:
        for row in falling:
            tokens = np.arange(len(row.times_s))
            axis.plot(row.times_s, tokens, color=COLOURS[row.system], label=row.label)

    def draw_memory(axis: Axes) -> None:
        for row in falling:
            times_s, resident = np.array(row.memory).T
            axis.plot(times_s, resident / 2**20, color=COLOURS[row.system])
        edges = falling[0].step_s * np.arange(len(falling[0].limits) + 1)
        limits = np.array([bytes_of(limit) for limit in falling[0].limits]) / 2**20
        axis.step(edges, [*limits, limits[-1]], where="post", color=INK, linestyle=":")

    panels = [
        Panel(draw_tokens, "Tokens of one answer", "CPU seconds", "tokens"),
        Panel(draw_memory, "Memory within the limit (dotted)", "CPU seconds", "resident, MiB"),
    ]
    return panel_figure(panels, height=3.4, legend=1, sharex=True)


STUDY = Study(
    "equal_process",
    "Beside llama.cpp in equal memory",
    [ProcessRow, RejectedRow, FallingRow],
    process_jobs,
    process_tables,
    frozen=("model", "evaluate.text"),
)

if __name__ == "__main__":
    launch(STUDY.name, STUDY.run)
