"""Measures `rap serve` and llama.cpp's server in equal memory."""

from __future__ import annotations

import contextlib
import logging
import mmap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
import transformers

from experiments.config import Config
from experiments.contexts import load_text
from experiments.llama_cpp import FileKind, LlamaCpp, gguf_file, make_file, need_llama_cpp
from experiments.studies.equal_process.rows import (
    LEAST,
    LLAMA,
    RAP,
    RESTARTED,
    FallingRow,
    ProcessRow,
    RejectedRow,
    best_file,
    bytes_of,
    process_tables,
)
from experiments.study.console import ExperimentError
from experiments.study.harness import Job, Study
from experiments.study.logits import compared, logits_of, window_logits
from experiments.study.servers import Server, llama_command, piece, rap_command
from rap_env.artifacts import atomic_write, digest
from rap_env.models.device import resident_bytes
from rap_env.models.files.loading import load_llm
from rap_env.models.live.calibration_text import calibration_windows
from rap_env.models.live.elastic import ElasticLLM
from rap_env.paths import cache_dir
from rap_env.plan import Plan

_PARTS = 8  # of a window, for intervals
_SAMPLE_S = 0.1
_SPARE_TOKENS = 64  # an answer's text may be encoded in more tokens than it was generated in


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


STUDY = Study(
    "equal_process",
    "Beside llama.cpp in equal memory",
    [ProcessRow, RejectedRow, FallingRow],
    process_jobs,
    process_tables,
    frozen=("model", "evaluate.text"),
)
