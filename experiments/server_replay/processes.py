"""Server processes, and their resident memory and CPU time as sampled from outside."""

from __future__ import annotations

import os
import re
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from experiments.errors import ExperimentError
from rap_env.errors import MemorySourceError
from rap_env.runtime.memory_meter import resident_bytes

SAMPLE_S = 0.02
"""Seconds between two samples of a process."""

_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
_STOP_S = 30.0
_URL = re.compile(r"http://[\d.]+:\d+")


@dataclass(frozen=True)
class Sample:
    """A process at one moment.

    Attributes:
        time_s: `time.monotonic` of the sample.
        resident: Resident bytes (VmRSS), with pages of mapped files.
        cpu_s: CPU seconds of the process so far, of all its threads.
    """

    time_s: float
    resident: int
    cpu_s: float


class ProcessSampler(threading.Thread):
    """Samples a process every `SAMPLE_S` seconds until it ends (Linux).

    Args:
        process: Its id.

    Attributes:
        samples: All samples so far, in order of time.
    """

    def __init__(self, process: int) -> None:
        super().__init__(name="sampler", daemon=True)
        self._process = Path(f"/proc/{process}")
        self.samples: list[Sample] = []

    def run(self) -> None:
        """Sample until the process ends."""
        while True:
            try:
                _, resident = resident_bytes(self._process)
                stat = (self._process / "stat").read_text()
            except (MemorySourceError, OSError, ValueError):
                return  # it has ended
            user, system = map(int, stat.rpartition(")")[2].split()[11:13])
            cpu_s = (user + system) / _CLOCK_TICKS
            self.samples.append(Sample(time.monotonic(), resident, cpu_s))
            time.sleep(SAMPLE_S)


class ServerProcess:
    """A context manager: a server with one thread in a process of its own, sampled from its start.

    Args:
        command: Program and arguments.
        ready: Regular expression of the line that the server writes, to either stream, when it
            accepts requests. That line or one before it has its address.

    Attributes:
        log: Lines that it has written so far.
        sampler: Samples of the process.
        url: Its address, once it is ready.

    Raises:
        ExperimentError: It ended before it was ready; the message ends with its last line.
    """

    def __init__(self, command: Sequence[str], ready: str) -> None:
        self._command = list(command)
        self._ready = re.compile(ready)
        self.log: list[str] = []
        self.url = ""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "MKL_NUM_THREADS": "1",
                "PYTHONUNBUFFERED": "1",
            },
        )
        self.sampler = ProcessSampler(self._process.pid)
        self.sampler.start()
        try:
            self._wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self.sampler.join()

    def _wait_until_ready(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.log.append(line.rstrip())
            if address := _URL.search(line):
                self.url = address[0]
            if self.url and self._ready.search(line):
                # A full pipe would block the server.
                threading.Thread(target=self._read_on, daemon=True).start()
                return
        last = next((line for line in reversed(self.log) if line), "no output")
        raise ExperimentError(f"The server did not start: {last}")

    def _read_on(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.log.append(line.rstrip())
