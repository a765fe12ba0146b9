"""A server whose weights go away for a minute: ``python -m benchmarks.missing_weights``.

The memory limit of a server falls and rises every few seconds, so that it removes blocks and reads
them again, while clients read streamed answers. Then all files with weights are renamed for a
while. The longest silence is the longest time in which no client got a piece of an answer; the same
load before the outage is the comparison.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx

from benchmarks.harness import Settings, Target, launch
from benchmarks.record import write_record
from experiments.server_replay.processes import ServerProcess
from experiments.server_replay.systems import RAP_READY

_WORDS = ("stone", "river", "light", "seven", "green", "walks", "over", "paper")
_POLL_S = 0.2
_FIRST_ANSWERS_S = 5.0  # before anything is measured
_LONGEST_RECOVERY_S = 120.0


@dataclass
class MissingWeightsSettings(Settings):
    """Settings of this benchmark; it measures the CPU."""

    threads: int | None = 1
    model: str = "smollm2-135m"
    limits_mib: list[int] = field(default_factory=lambda: [560, 430])
    """Limits of the process that follow each other; the first one is that of the start."""
    period_s: float = 5.0
    """Seconds under each limit."""
    phase_s: float = 60.0
    """Seconds of the comparison, and of the outage."""
    clients: int = 4
    answer_tokens: int = 24


class Streams:
    """Clients that read streamed answers, one after the other, until they are stopped.

    Attributes:
        times_s: `time.monotonic` of each piece of an answer, of all clients.
        outcomes: Number of answers by how they ended.
    """

    def __init__(self, url: str, clients: int, answer_tokens: int) -> None:
        self.times_s: list[float] = []
        self.outcomes: Counter[str] = Counter()
        self._url, self._answer_tokens = url, answer_tokens
        self._stopped = False
        for seed in range(clients):
            threading.Thread(target=self._run, args=(random.Random(seed),), daemon=True).start()

    def stop(self) -> None:
        """Let each client end after its answer; later ones do not count."""
        self._stopped = True

    def silence_s(self, start_s: float, end_s: float) -> float:
        """The longest time without a piece between two moments of `time.monotonic`."""
        return longest_gap_s(self.times_s, start_s, end_s)

    def _run(self, chance: random.Random) -> None:
        with httpx.Client(base_url=self._url, timeout=600) as http:
            while not self._stopped:
                outcome = self._read(http, " ".join(chance.choices(_WORDS, k=20)))
                if not self._stopped:
                    self.outcomes[outcome] += 1

    def _read(self, http: httpx.Client, prompt: str) -> str:
        body = {"model": "served", "prompt": prompt, "temperature": 0, "ignore_eos": True,
                "max_tokens": self._answer_tokens, "stream": True}  # fmt: skip
        pieces = 0
        try:
            with http.stream("POST", "/v1/completions", json=body) as response:
                for line in response.iter_lines():
                    if line.startswith("data: {"):
                        event = json.loads(line.removeprefix("data: "))
                        if "error" in event:
                            return str(event["error"].get("code"))
                        pieces += 1
                        self.times_s.append(time.monotonic())
                if response.status_code != 200:
                    return str(response.status_code)
        except httpx.HTTPError as error:
            return type(error).__name__
        return "answered" if pieces else "empty"


def longest_gap_s(times_s: Sequence[float], start_s: float, end_s: float) -> float:
    """The longest of the times between neighbours of sorted moments, and to both ends."""
    inside = sorted(moment for moment in times_s if start_s < moment < end_s)
    return max(later - earlier for earlier, later in pairwise([start_s, *inside, end_s]))


@contextmanager
def renamed(paths: Sequence[Path]) -> Iterator[None]:
    """Give files or folders another name in a ``with`` block."""
    places = [(path, path.with_name(f"{path.name}.away")) for path in paths]
    for path, away in places:
        path.rename(away)
    try:
        yield
    finally:
        for path, away in places:
            away.rename(path)


def main(settings: MissingWeightsSettings) -> None:
    """Measure, and write the record."""
    with tempfile.TemporaryDirectory() as folder:
        cache, file = Path(folder, "cache"), Path(folder, "limit")
        weights = _own_copy(settings.model, cache)
        command = [
            "env", f"RAP_CACHE_DIR={cache}",
            sys.executable, "-m", "rap_env.cli", "serve", "--port", "0", "--model", settings.model,
            "--model-name", "served", "--threads", str(settings.threads or 1), "--memory",
            f"{settings.limits_mib[0]}MiB", "--memory-file", str(file), "--max-delta-nll", "none",
        ]  # fmt: skip
        with ServerProcess(command, RAP_READY) as server:
            streams = Streams(server.url, settings.clients, settings.answer_tokens)
            time.sleep(_FIRST_ANSWERS_S)
            began_s = time.monotonic()
            _move(file, settings)
            outage_s, line = time.monotonic(), len(server.log)
            answered = streams.outcomes["answered"]
            with renamed([*weights, *cache.glob("offloaded")]):
                unready = _move(file, settings, server.url)
            back_s = time.monotonic()
            _wait_until_ready(server.url)
            ready_s = time.monotonic()
            streams.stop()
            lines = [text for text in server.log[line:] if " WARNING " in text or " ERROR " in text]
            measured: dict[str, Any] = {
                "silence_before_s": streams.silence_s(began_s, outage_s),
                "silence_in_outage_s": streams.silence_s(outage_s, back_s),
                "recovery_s": ready_s - back_s,
                "looks_not_ready": unready,
                "log_lines": len(lines),
                "answered_before": answered,
                "outcomes": dict(streams.outcomes),
            }
    silence = f"{measured['silence_before_s']:.2f} s before it"
    lost = sum(n for outcome, n in streams.outcomes.items() if outcome != "answered")
    write_record(
        "missing_weights",
        device="cpu",
        settings=settings,
        targets=[
            Target("longest silence during the outage, seconds", None, 1.0,
                   measured["silence_in_outage_s"], silence),
            Target("warnings and errors in the log", None, 5, len(lines)),
            Target("answers that did not end well", None, 0, lost),
            Target("seconds until all weights are back", None, 60.0, measured["recovery_s"]),
        ],
        measured=measured,
        notes=["looks_not_ready: answers of /readyz during the outage that were not 200."],
    )  # fmt: skip


def _own_copy(model: str, cache: Path) -> list[Path]:
    """Copy a model into another cache; returns its files with weights there."""
    from rap_env.models.files.sources import locate  # loads torch

    folder = locate(model, packed=True).folder
    shutil.copytree(folder, cache / "models" / folder.name)
    for remembered in folder.parent.glob("*.source"):
        shutil.copy(remembered, cache / "models")
    return sorted((cache / "models").rglob("*.safetensors"))


def _move(file: Path, settings: MissingWeightsSettings, url: str | None = None) -> int:
    """Move the limit for a phase; returns how often the server at `url` was not ready."""
    unready, end_s = 0, time.monotonic() + settings.phase_s
    for number in range(int(settings.phase_s / settings.period_s)):
        limit = settings.limits_mib[(number + 1) % len(settings.limits_mib)]
        file.write_text(f"{limit}MiB")
        while (left_s := end_s - time.monotonic()) > 0:
            if settings.phase_s - left_s >= (number + 1) * settings.period_s:
                break
            unready += url is not None and not _is_ready(url)
            time.sleep(_POLL_S)
    return unready


def _is_ready(url: str) -> bool:
    return httpx.get(f"{url}/readyz", timeout=60).status_code == 200


def _wait_until_ready(url: str) -> None:
    end_s = time.monotonic() + _LONGEST_RECOVERY_S
    while not _is_ready(url) and time.monotonic() < end_s:
        time.sleep(_POLL_S)


if __name__ == "__main__":
    launch(MissingWeightsSettings, main)
