"""Resident memory of `rap serve` against its limit: ``python -m benchmarks.process_limit``.

A server runs in a process of its own with ``memory`` and ``memory_file``. Clients send prompts of
many lengths. Another thread reads the server's resident memory every 20 ms, from its start on:
under a constant limit, then while the file lowers and raises the limit.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness import Settings, Target, launch
from benchmarks.record import write_record
from experiments.server_replay.processes import ProcessSampler, Sample, ServerProcess
from experiments.server_replay.systems import RAP_READY

_MIB = 2**20
_WORDS = ("stone", "river", "light", "seven", "green", "walks", "over", "paper")
_PROMPT_WORDS = (5, 10, 20, 40, 60, 100, 200)
_ANSWER_TOKENS = (8, 16, 32)


@dataclass
class ProcessLimitSettings(Settings):
    """Settings of this benchmark; it measures the CPU."""

    threads: int | None = 1
    model: str = "smollm2-135m"
    memory_mib: int = 520
    """The limit at the start."""
    constant_s: float = 60.0
    """Seconds under the constant limit, once the server is ready."""
    limits_mib: list[int] = field(default_factory=lambda: [490, 460, 440, *(520, 440) * 5, 520])
    """Later limits, each written to the file."""
    limit_s: float = 8.0
    """Seconds under each later limit."""
    clients: int = 4
    prefill_chunk_tokens: list[int] = field(default_factory=lambda: [256, 64])
    """Tokens of a prefill chunk; one server after the other has each."""


class _Clients:
    """Threads that send completion requests until they are stopped.

    Attributes:
        statuses: Numbers of responses by status, or by the name of an error.
    """

    def __init__(self, url: str, number: int) -> None:
        self.statuses: Counter[str] = Counter()
        self._url = url
        self._stopped = False
        for seed in range(number):
            threading.Thread(target=self._run, args=(random.Random(seed),), daemon=True).start()

    def stop(self) -> None:
        self._stopped = True

    def _run(self, chance: random.Random) -> None:
        while not self._stopped:
            words = chance.choices(_WORDS, k=chance.choice(_PROMPT_WORDS))
            body = {"model": "served", "prompt": " ".join(words), "temperature": 0,
                    "max_tokens": chance.choice(_ANSWER_TOKENS)}  # fmt: skip
            request = urllib.request.Request(
                f"{self._url}/v1/completions",
                json.dumps(body).encode(),
                {"content-type": "application/json"},
            )
            try:
                with urllib.request.urlopen(request, timeout=600) as response:
                    response.read()
                    status = str(response.status)
            except urllib.error.HTTPError as error:
                status = str(error.code)
            except OSError as error:
                status = type(error).__name__
            if not self._stopped:
                self.statuses[status] += 1


@dataclass(frozen=True)
class _Found:
    """What a server did: samples under the constant limit, later limits, responses."""

    constant: list[Sample]
    changes: list[dict[str, Any]]
    statuses: Counter[str]

    def most_over_s(self) -> float:
        return max(float(change["over_s"]) for change in self.changes)


def main(settings: ProcessLimitSettings) -> None:
    """Measure, and write the record."""
    found = {chunk: _serve(settings, chunk) for chunk in settings.prefill_chunk_tokens}
    constant = [sample for each in found.values() for sample in each.constant]
    limit = settings.memory_mib * _MIB
    over = sum(sample.resident > limit for sample in constant)
    write_record(
        "process_limit",
        device="cpu",
        settings=settings,
        targets=[
            Target("samples above a constant limit, start included", None, 0, over,
                   f"{len(constant):,} samples"),
            *(
                Target(f"seconds above a lowered limit, the longest of all, chunks of {chunk}",
                       None, 0.5, each.most_over_s())
                for chunk, each in found.items()
            ),
        ],
        measured={
            "most_bytes_under_constant_limit": max(sample.resident for sample in constant),
            "by_chunk_tokens": {
                str(chunk): {"changes": each.changes, "responses": dict(each.statuses)}
                for chunk, each in found.items()
            },
        },
        notes=[
            "The server's resident memory (VmRSS) was read from outside every 20 ms.",
            "over_s is the time from the write of a limit to the last sample above it, "
            "over_cpu_s the CPU time that the server had in it: where other programs use the "
            "machine, a pass through the model takes many times its CPU time.",
        ],
    )  # fmt: skip


def _serve(settings: ProcessLimitSettings, chunk_tokens: int) -> _Found:
    """Run a server under the constant limit, then under the others."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "limit"
        command = [
            sys.executable, "-m", "rap_env.cli", "serve", "--port", "0", "--model", settings.model,
            "--model-name", "served", "--threads", str(settings.threads or 1),
            "--memory", f"{settings.memory_mib}MiB", "--memory-file", str(file),
            "--prefill-chunk-tokens", str(chunk_tokens),
        ]  # fmt: skip
        started_s = time.monotonic()
        with ServerProcess(command, RAP_READY) as server:
            clients = _Clients(server.url, settings.clients)
            time.sleep(settings.constant_s)
            constant = server.sampler.between(started_s, time.monotonic())
            changes = _change(file, settings, server.sampler)
            clients.stop()
    return _Found(constant, changes, clients.statuses)


def _change(
    file: Path, settings: ProcessLimitSettings, sampler: ProcessSampler
) -> list[dict[str, Any]]:
    """Write each limit to the file, and find for how long the server stays above it."""
    found: list[dict[str, Any]] = []
    before = settings.memory_mib
    for limit in settings.limits_mib:
        began_s = time.monotonic()
        file.write_text(f"{limit}MiB")
        time.sleep(settings.limit_s)
        samples = sampler.between(began_s, time.monotonic())
        above = [sample for sample in samples if sample.resident > limit * _MIB]
        found.append({
            "from_mib": before,
            "to_mib": limit,
            "over_s": above[-1].time_s - began_s if above else 0.0,
            "over_cpu_s": above[-1].cpu_s - samples[0].cpu_s if above else 0.0,
            "samples": len(samples),
            "samples_over_after_half_second": sum(s.time_s - began_s > 0.5 for s in above),
        })  # fmt: skip
        before = limit
    return found


if __name__ == "__main__":
    launch(ProcessLimitSettings, main)
