"""``python -m experiments.studies.replay.conversations``: what keeping sequences gains.

Conversations that are drawn from a seed, and those of a trace, are served without keeping,
keeping what was read as it is, and keeping it also with fewer bits, within a memory limit that
holds a part of all conversations.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.config import Config
from experiments.contexts import load_model, load_text
from experiments.launch import launch
from experiments.studies.replay.serving import SystemRun
from experiments.studies.replay.study import decimals, outcome, percentile
from experiments.studies.replay.workload import Budget, Turn, draw_conversations, prefix_requests
from experiments.study.harness import Job, Study
from experiments.study.json_records import Record
from experiments.study.plotting import INK, LEVEL_COLOURS, Panel, panel_figure
from experiments.study.statistics import mean_of_known
from experiments.study.table_format import TitledTable, columns_table, percent
from rap_env.artifacts import digest
from rap_env.memory import MemoryModel
from rap_env.policies.base import Policy
from rap_env.policies.loading import load_policy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Start = Callable[[], SystemRun]
"""Makes the run of a system that serves a workload."""

DRAWN, TRACE, FALLING = "drawn", "trace", "falling"
"""The workloads: drawn conversations, those of a trace, and drawn ones while the limit falls
and returns."""
SYSTEMS: dict[str, tuple[str, dict[str, Any]]] = {
    "off": ("Nothing is kept", {"keep": False}),
    # So that nothing with fewer bits than the plan serves.
    "native": ("Kept as it was read", {"keep_delta_nll": 0.0}),
    "lowered": ("Kept, lowered before it is dropped", {}),
}
"""Name in tables, and options of the engine beside its defaults, of each system."""

_POINTS = 400  # of a time series, about
_UNITS = np.array([[1], [2**20], [2**20], [2**20]])  # of a time series in a figure: s and MiB


@dataclass(frozen=True)
class ConversationRow(Record):
    """One system on one workload. Times are seconds of the replay's clock.

    Attributes:
        workload: `DRAWN`, `TRACE` or `FALLING`.
        system: As in `SYSTEMS`.
        outcomes: Number of requests by what became of them, as in `ReplayRow`.
        limit_bytes: Most bytes that the limit was.
        prompt_tokens: Tokens of the prompts of all served requests.
        kept_tokens: Those of them that were kept and not read, by the levels that they had.
        tokens_per_s: Tokens of served requests per second from first arrival to last token.
        first_token_s: Time to the first token of each served request from the second turn of
            its conversation on.
        predicted_delta_nll: Predicted rise in NLL of the plans with which answers were
            generated, or, if that is larger, with which kept tokens were read, with the levels
            that they had; mean over tokens, nats per token; None without predictions.
        time_series: Time, bytes of the limit, measured bytes, and those of them that are kept.
    """

    file = "conversations.jsonl"
    identity = ("workload", "system")

    workload: str
    system: str
    outcomes: dict[str, int]
    limit_bytes: int
    prompt_tokens: int
    kept_tokens: dict[str, int]
    tokens_per_s: float
    first_token_s: list[float]
    predicted_delta_nll: float | None
    time_series: list[tuple[float, int, int, int]]


def conversation_jobs(config: Config, folder: Path) -> Iterator[Job[ConversationRow]]:
    """Yield each system on each workload, then the last system while the limit falls."""
    settings, replay = config.conversations, config.replay
    llm = load_model(config)
    policy = load_policy(settings.policy, llm)
    memory = MemoryModel(llm, replay.prefill_chunk_tokens)
    corpus = load_text(replay.text, "report", llm, progress=config.progress)
    text = corpus.tokens.flatten().tolist()
    loads = {DRAWN: draw_conversations(settings, text, config.seed)}
    if replay.trace is not None:
        loads[TRACE] = prefix_requests(replay, text, config.seed)
    loads[FALLING] = loads[DRAWN]
    for workload, (requests, all_tokens) in loads.items():
        least = memory.native_peak_bytes(1, max(turn.all_tokens for turn in requests))
        held = settings.held_share * all_tokens * sum(memory.facts.kv_bytes_per_token)
        limits, times_s, systems = [least + round(held)], [0.0], list(SYSTEMS)
        if workload == FALLING:
            limits, systems = [limits[0], least, limits[0]], systems[-1:]
            times_s += [settings.fall_s, settings.return_s]
        for system in systems:
            depends_on = {
                **memory.facts.identity,
                "load_sha256": digest(list(map(asdict, requests))),
                "options": SYSTEMS[system][1],
                "limits_bytes": limits,
            }
            start = partial(SystemRun, replay, llm, requests, Budget(times_s, limits))
            make = partial(served, workload, system, start, policy)
            yield Job(ConversationRow, (workload, system), depends_on, make)


def served(workload: str, system: str, start: Start, policy: Policy) -> ConversationRow:
    """Serve a workload with a system."""
    run = start()
    run.serve(policy, **SYSTEMS[system][1])
    pairs = zip(run.requests, run.handles, strict=True)
    turns = [(r, h) for r, h in pairs if isinstance(r, Turn) and h and outcome(h) == "served"]
    rise, kept = run.controller.chooser.rise, Counter[str]()
    rises = [
        max(
            (rise(each, handle.final_tokens) for each in (plan, *handle.kept_plans)),
            key=lambda value: math.inf if value is None else value,
        )
        for _, handle in turns
        for plan in handle.plans
    ]
    for _, handle in turns:
        kept.update(handle.kept_levels)
    later = [(turn, handle) for turn, handle in turns if turn.turn or turn.again]
    ended_s = max(handle.ended_s or 0.0 for _, handle in turns)
    steps = run.intervals[:: 1 + len(run.intervals) // _POINTS]
    return ConversationRow(
        workload=workload,
        system=system,
        outcomes=dict(Counter(map(outcome, run.handles))),
        limit_bytes=max(run.budget.levels_bytes),
        prompt_tokens=sum(len(turn.prompt_ids) for turn, _ in turns),
        kept_tokens=dict(kept),
        tokens_per_s=len(rises) / (ended_s - run.requests[0].time_s),
        first_token_s=[round((h.first_token_s or 0.0) - t.time_s, 4) for t, h in later],
        predicted_delta_nll=mean_of_known(rises),
        time_series=[
            (round(i.end_s, 2), i.budget_bytes, i.peak_bytes, i.kept_bytes) for i in steps
        ],
    )


def conversation_tables(rows: Sequence[ConversationRow]) -> list[TitledTable]:
    """Each system on each workload."""

    def lowered(row: ConversationRow) -> str:
        kept = sum(row.kept_tokens.values())
        return percent(1 - row.kept_tokens.get("native", 0) / kept) if kept else "-"

    columns: dict[str, Callable[[ConversationRow], str]] = {
        "Workload": lambda row: row.workload.capitalize(),
        "System": lambda row: SYSTEMS[row.system][0],
        "Served": lambda row: f"{row.outcomes['served']} of {sum(row.outcomes.values())}",
        "Prompt tokens kept": lambda r: percent(sum(r.kept_tokens.values()) / r.prompt_tokens),
        "of these with fewer bits": lowered,
        "Tokens/s": lambda row: f"{row.tokens_per_s:.1f}",
        "First token p50": partial(percentile, 50, "first_token_s"),
        "p95": partial(percentile, 95, "first_token_s"),
        "ΔNLL of plans": lambda row: decimals(row.predicted_delta_nll, 4),
    }
    return [TitledTable(columns_table(rows, columns))]


def memory_figure(rows: Sequence[ConversationRow]) -> Figure:
    """Draw running, kept and free bytes over time while the limit falls and returns."""
    (row,) = (row for row in rows if row.workload == FALLING)
    times_s, limit, used, kept = np.array(row.time_series).T / _UNITS

    def draw(axis: Axes) -> None:
        parts = {"model and running requests": used - kept, "kept": kept, "free": limit - used}
        colours = [LEVEL_COLOURS[level] for level in ("int3", "int8", "native")]
        heights = np.maximum(0, list(parts.values()))
        axis.stackplot(times_s, heights, labels=list(parts), colors=colours)
        axis.step(times_s, limit, where="post", color=INK, label="limit")

    return panel_figure([Panel(draw, x="seconds", y="MiB")], height=3.2)


STUDY = Study(
    "conversations",
    "Conversations that are kept",
    [ConversationRow],
    conversation_jobs,
    conversation_tables,
    frozen=("model", "seed", "replay", "conversations"),
)

if __name__ == "__main__":
    launch(STUDY.name, STUDY.run)
