"""What `rap serve` and llama.cpp did in equal memory: rows, their tables and their figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from experiments.study.console import ExperimentError
from experiments.study.harness import DeltaNLLRecord
from experiments.study.json_records import Record
from experiments.study.plotting import INK, Panel, panel_figure
from experiments.study.table_format import TitledTable, mebibytes, percent, precise
from rap_env.request import parse_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RAP, LLAMA = "rap serve", "llama.cpp"
RESTARTED, LEAST = "llama.cpp, started again", "llama.cpp, least file"
"""Ways to serve within a limit that falls, beside `RAP`: the best file for each limit, and the
file for the least limit at all of them."""
COLOURS = {RAP: "#F0001C", RESTARTED: "#2F78B9", LEAST: "#8D9299"}

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
