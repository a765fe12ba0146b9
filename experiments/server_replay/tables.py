"""Tables of a replay on servers, from its rows alone."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.server_replay.records import ServerReplayRow
from experiments.study.statistics import Estimate
from experiments.study.tables import Table, markdown, mebibytes, percent, plain, seconds, wrapped

LEGEND = (
    "Each server gets the same arrivals over HTTP in real time, with one thread and greedy "
    "decoding; its answers have as many tokens as asked for. Budget: resident memory of the whole "
    "process. Peak, Over: maximum of the resident memory, sampled from outside every 20 ms from "
    "the start of the process on, and samples above the budget. Model: bytes of weights, cache and "
    "compute buffers, as llama.cpp's log states them; `rap, that as model memory` gets this number "
    "of llama.cpp with a cache in f16 as `--model-memory`, for the model alone, so that "
    "interpreter and libraries come on top of it. Context: tokens of llama.cpp's cache, found with "
    "so many trial starts. TTFT: time from arrival to first token; TPOT: time per output token "
    "after it; both of served requests. CPU: CPU seconds of the server. ΔNLL: NLL of the answers "
    "under the dense model minus that of its own greedy continuation of the same prompts, "
    "nats/token, with a 95 % interval over requests. Same: tokens equal to that continuation."
)
"""Meaning of the columns."""

LABELS = {
    "rap": "rap",
    "rap_model_memory": "rap, that as model memory",
    "llama_f16": "llama.cpp, f16 cache",
    "llama_q8_0": "llama.cpp, q8_0 cache",
    "llama_q4_0": "llama.cpp, q4_0 cache",
}
"""Display names of systems."""


def serving_table(rows: Sequence[ServerReplayRow]) -> Table:
    """Served requests, and memory against the budget."""
    header = ["Server", "Served", "Not served", "Peak", "Over", "Model", "Context", "Starts"]
    return header, [
        [
            LABELS[row.system], percent(row.served / row.requests, 0), _not_served(row),
            mebibytes(row.peak_bytes) if row.samples else "-",
            f"{row.samples_over:,} of {row.samples:,}" if row.samples else "-",
            "-" if row.model_bytes is None else mebibytes(row.model_bytes),
            "-" if row.context_tokens is None else f"{row.context_tokens:,}",
            "-" if row.trial_starts is None else f"{row.trial_starts}",
        ]
        for row in rows
    ]  # fmt: skip


def _not_served(row: ServerReplayRow) -> str:
    counts = {"refused": row.refused, "timed out": row.timed_out, "failed": row.failed}
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "-"


def latency_table(rows: Sequence[ServerReplayRow]) -> Table:
    """Latency, throughput and CPU time."""
    header = ["Server", "TTFT p50", "p95", "p99", "TPOT p50", "p95", "p99", "Tokens/s", "CPU"]
    names = [f"{kind}_p{p}_s" for kind in ("ttft", "tpot") for p in (50, 95, 99)]
    return header, [
        [
            LABELS[row.system],
            *["-" if (v := getattr(row, name)) is None else seconds(v) for name in names],
            f"{row.tokens_per_s:.1f}",
            f"{row.cpu_s:.0f} s",
        ]
        for row in _started(rows)
    ]


def quality_table(rows: Sequence[ServerReplayRow]) -> Table:
    """Quality of the answers."""
    header = ["Server", "ΔNLL", "Same"]
    return header, [
        [LABELS[row.system], _delta_nll(row), percent(row.same_fraction, 0)]
        for row in _started(rows)
    ]


TABLES = {
    "Served, and memory": serving_table,
    "Latency": latency_table,
    "Quality": quality_table,
}
"""All tables by title."""


def server_replay_markdown(rows: Sequence[ServerReplayRow]) -> str:
    """All tables in Markdown, those of each budget together."""
    parts = [f"# Replay on servers\n\n{setting_words(rows)}\n\n{LEGEND}\n"]
    for budget, group in _by_budget(rows):
        parts += [f"## Within {mebibytes(budget)}\n"]
        parts += [f"**{title}**\n\n{markdown(make(group))}" for title, make in TABLES.items()]
        parts += [f"{LABELS[row.system]}: {row.startup_error}\n" for row in _refused(group)]
    return "\n".join(parts)


def server_replay_text(rows: Sequence[ServerReplayRow]) -> str:
    """All tables for the terminal."""
    parts = [wrapped(setting_words(rows))]
    for budget, group in _by_budget(rows):
        parts += [f"Within {mebibytes(budget)}"]
        parts += [plain(make(group)) for make in TABLES.values()]
        parts += [wrapped(f"{LABELS[row.system]}: {row.startup_error}") for row in _refused(group)]
    return "\n\n".join([*parts, wrapped(LEGEND)])


def setting_words(rows: Sequence[ServerReplayRow]) -> str:
    """Describe what was replayed."""
    if not rows:
        return "No server was run."
    row = rows[0]
    load, depends = row.provenance.get("load", {}), row.provenance.get("depends_on", {})
    prompt, new = (load.get(f"{part}_tokens_mean", 0) for part in ("prompt", "new"))
    versions = {r.provenance.get("depends_on", {}).get("llama_cpp") for r in rows} - {None}
    llama = f" llama.cpp is version {', '.join(sorted(versions))}." if versions else ""
    return (
        f"{row.requests} requests of {load.get('trace', 'a trace')} within "
        f"{load.get('last_arrival_s', 0):.0f} s (prompts of {prompt:.0f} and answers of {new:.0f} "
        f"tokens on average) to {depends.get('model', 'a model')}, at most "
        f"{depends.get('settings', {}).get('slots', '-')} at a time.{llama}"
    )


def _by_budget(rows: Sequence[ServerReplayRow]) -> list[tuple[int, list[ServerReplayRow]]]:
    """The rows of each budget, in the order of the labels."""
    order = list(LABELS)
    budgets = list(dict.fromkeys(row.budget_bytes for row in rows))
    return [
        (
            budget,
            sorted(
                (row for row in rows if row.budget_bytes == budget),
                key=lambda row: order.index(row.system),
            ),
        )
        for budget in budgets
    ]


def _started(rows: Sequence[ServerReplayRow]) -> list[ServerReplayRow]:
    return [row for row in rows if row.startup_error is None]


def _refused(rows: Sequence[ServerReplayRow]) -> list[ServerReplayRow]:
    return [row for row in rows if row.startup_error is not None]


def _delta_nll(row: ServerReplayRow) -> str:
    if row.loss_mean is None or row.loss_ci_low is None or row.loss_ci_high is None:
        return "-"
    return str(Estimate(row.loss_mean, row.loss_ci_low, row.loss_ci_high))
