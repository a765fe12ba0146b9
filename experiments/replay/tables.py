"""Tables of a replay, from its rows alone."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.comparison.statistics import Estimate, wilson_interval
from experiments.comparison.tables import (
    Table,
    markdown,
    mebibytes,
    percent,
    plain,
    seconds,
    wrapped,
)
from experiments.replay.rows import ReplayRow

LEGEND = (
    "Every system gets the same arrivals under the same budget. Over budget: measured bytes above "
    "the budget that held when a step began, integrated over time. Served: requests that got all "
    "their tokens; those that any mask fits are counted apart. TTFT: seconds from arrival to the "
    "first token; TPOT: seconds of each token after it; both of served requests, in the replay's "
    "time, which runs while the engine works and jumps over idle time. Loss: what the dense model "
    "loses on the generated tokens, less what it loses on its own greedy continuation of the same "
    "prompts, nats per token, with a 95 % interval over requests. Masks' loss: rise of the NLL on "
    "text from a file, mean over generated tokens. Controller: seconds of deciding and switching "
    "as a share of all work."
)
"""What the columns mean."""


LABELS = {
    "dense": "Dense",
    "static_gsi": "Static, GSI",
    "static_gsi_lean": "Static, lean",
    "static_shortgpt": "Static, ShortGPT",
    "greedy": "Greedy, live",
    "frontier": "Frontier table",
    "rap": "RAP policy",
    "oracle": "Oracle",
}
"""Names of systems for people."""


def serving_table(rows: Sequence[ReplayRow]) -> Table:
    """Who was served, within which memory."""
    header = ["System", "Served", "of servable", "Refused", "Gave up", "Waited", "Over budget",
              "Steps over", "Peak"]  # fmt: skip
    return header, [
        [
            system_label(row.system), percent(row.served_fraction),
            percent(row.served_fraction_of_servable), f"{row.refused + row.queue_full}",
            f"{row.timed_out + row.failed}", f"{row.queued}", megabyte_seconds(row),
            f"{row.violations}", mebibytes(row.peak_bytes),
        ]
        for row in rows
    ]  # fmt: skip


def latency_table(rows: Sequence[ReplayRow]) -> Table:
    """How long it took."""
    header = ["System", "TTFT p50", "p95", "p99", "TPOT p50", "p95", "p99", "Tokens/s"]
    names = [f"{kind}_p{p}_s" for kind in ("ttft", "tpot") for p in (50, 95, 99)]
    return header, [
        [
            system_label(row.system),
            *[_seconds(getattr(row, name)) for name in names],
            f"{row.tokens_per_s:.1f}",
        ]
        for row in rows
    ]


def quality_table(rows: Sequence[ReplayRow]) -> Table:
    """How good what was generated is."""
    header = ["System", "Loss", "Masks' loss", "Same tokens", "Accuracy", "Blocks removed"]
    return header, [
        [
            system_label(row.system), _loss(row), _number(row.mask_loss_mean, 3),
            percent(row.same_fraction, 0), _accuracy(row), _number(row.removed_mean, 1),
        ]
        for row in rows
    ]  # fmt: skip


def costs_table(rows: Sequence[ReplayRow]) -> Table:
    """What adapting costs."""
    header = ["System", "Switches", "each", "Decisions", "each", "Masks", "Preempted", "Controller",
              "Energy"]  # fmt: skip
    return header, [
        [
            system_label(row.system), f"{row.switches}", _each(row.switch_s, row.switches),
            f"{row.decisions}", _each(row.decision_s, row.decisions), f"{row.masks}",
            f"{row.preemptions}", percent(row.controller_overhead_fraction, 2),
            "-" if row.energy_j is None else f"{row.energy_j / 1e3:.2f} kJ",
        ]
        for row in rows
    ]  # fmt: skip


TABLES = {
    "Served, and memory": serving_table,
    "Latency": latency_table,
    "Quality": quality_table,
    "Cost of adapting": costs_table,
}
"""All tables by their title."""


def replay_markdown(rows: Sequence[ReplayRow]) -> str:
    """All tables in Markdown."""
    parts = [f"# Replay\n\n{setting_words(rows)}\n\n{LEGEND}\n"]
    parts += [f"## {title}\n\n{markdown(make(rows))}" for title, make in TABLES.items()]
    return "\n".join(parts)


def replay_text(rows: Sequence[ReplayRow]) -> str:
    """All tables for the terminal, at most 100 columns wide."""
    tables = [plain(make(rows)) for make in TABLES.values()]
    return "\n\n".join([wrapped(setting_words(rows)), *tables, wrapped(LEGEND)])


def setting_words(rows: Sequence[ReplayRow]) -> str:
    """What was replayed, in a sentence or two."""
    if not rows:
        return "No system was run."
    row = rows[0]
    load, depends = row.provenance.get("load", {}), row.provenance.get("depends_on", {})
    budget = depends.get("budget", {})
    prompt, new = (load.get(f"{part}_tokens_mean", 0) for part in ("prompt", "new"))
    return (
        f"{row.requests} requests of {load.get('trace', 'a trace')} within "
        f"{load.get('last_arrival_s', 0):.0f} s (prompts of {prompt:.0f} and "
        f"answers of {new:.0f} tokens on average) to "
        f"{depends.get('model', 'a model')}, under a budget that moves ({budget.get('name', '-')}; "
        f"at least {mebibytes(row.budget_least_bytes)}, 100 % being "
        f"{mebibytes(depends.get('reference_bytes', 0))})."
    )


def system_label(name: str) -> str:
    """What a system is called."""
    return LABELS.get(name, name)


def megabyte_seconds(row: ReplayRow) -> str:
    """Byte-seconds above the budget, for people."""
    amount = row.violation_byte_s / 1e6
    return "0" if amount == 0 else f"{amount:{',.0f' if amount >= 100 else '.3g'}} MB s"


def _seconds(value: float | None) -> str:
    return "-" if value is None else seconds(value)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _each(total_s: float, count: int) -> str:
    return seconds(total_s / count) if count else "-"


def _loss(row: ReplayRow) -> str:
    if row.loss_mean is None or row.loss_ci_low is None or row.loss_ci_high is None:
        return "-"
    return str(Estimate(row.loss_mean, row.loss_ci_low, row.loss_ci_high))


def _accuracy(row: ReplayRow) -> str:
    if row.accuracy is None:
        return "-"
    low, high = wilson_interval(row.accuracy, row.accuracy_n)
    shown = f"{percent(row.accuracy, 0)} [{100 * low:.0f}, {100 * high:.0f}]"
    return f"{shown} of {row.accuracy_n}"
