"""The record of a trial in a memory cgroup: what its clients saw, its measures and its figure."""

from __future__ import annotations

import gzip
import itertools
import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.study.plotting import INK, style
from experiments.study.table_format import markdown
from rap_env.artifacts import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MIB = 2**20
_PALE = "#ccd0d6"
SYSTEMS = {
    "rap": "rap serve",
    "llama.cpp": "llama.cpp's server, f16 cache",
    "transformers": "transformers serve, bfloat16",
}
"""Servers that the trial starts, with their names in tables."""
_CALM_S = 5.0
"""Seconds of native caches in all rows after which times between tokens count as undisturbed."""


@dataclass
class Answer:
    """One answer: when it was asked for, when its pieces came, and how it ended.

    Attributes:
        asked_s: Seconds since the start.
        times_s: When each piece of text came.
        tokens: Tokens of the answer, as the server counts them.
        error: Why it failed; None if it is complete.
        delta_nll: Its plan's rise in NLL, as `rap serve` predicts it, nats per token.
    """

    asked_s: float
    times_s: list[float] = field(default_factory=list)
    tokens: int = 0
    error: str | None = None
    delta_nll: float = 0.0


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

    @classmethod
    def read(cls, file: Path) -> Trial:
        """The record in a file."""
        fields = json.loads(gzip.decompress(file.read_bytes()))
        return cls(**fields | {"answers": [Answer(**answer) for answer in fields["answers"]]})

    def write(self, file: Path) -> None:
        """Write the record to a file."""
        with atomic_write(file) as stream:
            stream.write(gzip.compress(json.dumps(asdict(self)).encode(), mtime=0))

    @property
    def longest_silence_s(self) -> float:
        """Longest time without a piece of any answer while one was open."""
        moves = sorted(
            time_s for answer in self.answers for time_s in (answer.asked_s, *answer.times_s)
        )
        return max((b - a for a, b in itertools.pairwise(moves)), default=0.0)

    @cached_property
    def gaps(self) -> list[tuple[float, float]]:
        """When each time between two pieces of an answer began and ended."""
        return [gap for answer in self.answers for gap in itertools.pairwise(answer.times_s)]

    @cached_property
    def returns(self) -> list[tuple[float, list[list[float]]]]:
        """Each return of memory: when it was back, and the samples with native caches in the plan.

        It is back when the budget reaches nine tenths of what it is when the plan has native caches
        again, and does not fall below that in between.
        """
        returns, before = [], list[list[float]]()
        for native, group in itertools.groupby(self.samples, self._is_native):
            rows = list(group)
            if native and before:
                enough = 0.9 * rows[0][3]
                budget = itertools.takewhile(lambda row: row[3] >= enough, reversed(before))  # noqa: B023
                returns.append(([rows[0], *budget][-1][0], rows))
            before = rows
        return returns

    def _is_native(self, row: list[float]) -> bool:
        return row[4] == self._most_native

    @cached_property
    def _most_native(self) -> float:
        return max(row[4] for row in self.samples)

    @property
    def recoveries_s(self) -> list[float]:
        """After each return of memory: until a tenth of the rows at most is below the plan."""
        backs = [
            (since_s, next((row[0] for row in rows if row[7] <= 0.1 * row[5]), None))
            for since_s, rows in self.returns
        ]
        return [back_s - since_s for since_s, back_s in backs if back_s is not None]

    @cached_property
    def calm_gaps_s(self) -> list[float]:
        """Times between pieces while the plan and all rows had native caches for a while."""
        gaps_s: list[float] = []
        calm = itertools.groupby(self.samples, lambda row: self._is_native(row) and not row[7])
        for rows in (list(group) for native, group in calm if native):
            first_s, last_s = rows[0][0] + _CALM_S, rows[-1][0]
            gaps_s += [end - start for start, end in self.gaps if first_s <= start < end <= last_s]
        return gaps_s

    @property
    def rate_recoveries_s(self) -> list[float]:
        """After each return of memory: until tokens come within 10 % of the undisturbed rate.

        That is the rate of the median time between pieces that end within the next second.
        """
        goal_s, recoveries = 1.1 * statistics.median(self.calm_gaps_s or [0]), []
        for since_s, rows in self.returns:
            gaps = [(a, b) for a, b in self.gaps if since_s - 1 <= b <= rows[-1][0] + 1]
            for begin_s in range(round(10 * since_s), round(10 * rows[-1][0])):
                gaps_s = [b - a for a, b in gaps if begin_s <= 10 * b < begin_s + 10]
                if gaps_s and statistics.median(gaps_s) <= goal_s:
                    recoveries.append(begin_s / 10 - since_s)
                    break
        return recoveries

    @property
    def slowdown(self) -> float:
        """Mean time per piece, while memory is back, of answers alive then / undisturbed."""
        after_s = [
            end - start
            for since_s, rows in self.returns
            for answer in self.answers
            if answer.asked_s < since_s
            for start, end in itertools.pairwise(answer.times_s)
            if since_s <= start < end <= rows[-1][0]
        ]
        return statistics.fmean(after_s or [0]) / statistics.fmean(self.calm_gaps_s or [1])

    @property
    def minutes(self) -> float:
        """How long it was; less than its setting if the kernel killed the tenant."""
        return self.samples[-1][0] / 60 if self.samples else 0.0

    @property
    def measures(self) -> dict[str, str]:
        """What the trial measures, in words."""
        answered = [answer for answer in self.answers if answer.error is None]
        tokens = sum(answer.tokens for answer in self.answers)
        gap_s = statistics.median([end - start for start, end in self.gaps] or [0])
        measures = {
            "Minutes": f"{self.minutes:.1f}",
            "Requests answered": f"{len(answered)}",
            "Requests failed": f"{len(self.answers) - len(answered)}",
            "Processes killed, and started again": f"{self.kills}",
            "Tokens a second": f"{tokens / (60 * self.minutes or 1):.1f}",
            "Longest time without a token": f"{self.longest_silence_s:.1f} s",
            "Time between the pieces of an answer, median": f"{1000 * gap_s:.0f} ms",
        }
        if answered:
            delta_nll = statistics.fmean(answer.delta_nll or 0 for answer in answered)
            measures["ΔNLL of the answers' plans, mean"] = f"{delta_nll:.3f}"
        if self.returns:
            *_, preemptions, read, again, _, _ = self.samples[-1]
            measures |= {
                "Preemptions": f"{preemptions:.0f}",
                "Prompt tokens read again": f"{100 * again / max(1, read):.1f} %",
                "Returns of memory": f"{len(self.returns)}",
                "After a return: until all rows have native caches": _times(self.recoveries_s),
                "until tokens come at the undisturbed rate": _times(self.rate_recoveries_s),
                "time per token of answers alive then": f"{self.slowdown:.2f} times undisturbed",
            }
        return measures


def _times(seconds: list[float]) -> str:
    middle, most = statistics.median(seconds or [0]), max(seconds, default=0)
    return f"{middle:.1f} s (median of {len(seconds)}, at most {most:.1f} s)"


def trial_table(trials: Mapping[str, Trial]) -> str:
    """A table with a column for each system, by its name in `SYSTEMS`."""
    columns = [trial.measures for trial in trials.values()]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [[name, *(column.get(name, "-") for column in columns)] for name in names]
    return markdown((["", *(SYSTEMS[system] for system in trials)], rows))


def trial_figure(trial: Trial) -> Figure:
    """Memory against the limit, levels of caches, and tokens a second, over time."""
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(9, 6), layout="constrained")
        memory, levels, tokens = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1.5, 1.5))
        _draw_memory(memory, trial)
        times = [row[0] for row in trial.samples]
        native = max(row[4] for row in trial.samples)
        plan = [100 * row[4] / native for row in trial.samples]
        levels.fill_between(times, plan, color=_PALE, step="post", label="plan")
        share = [100 * (1 - row[7] / row[5]) if row[5] else 100.0 for row in trial.samples]
        levels.plot(times, share, color=INK, lw=0.8, label="answers at the plan's levels")
        levels.set(ylabel="native caches, %", ylim=(0, 105))
        levels.legend(loc="lower right", fontsize=7, frameon=True)
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
