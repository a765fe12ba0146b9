"""Tables of a replay, from its rows alone."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.config.serving import UNIFORM_SYSTEMS
from experiments.replay.records import ReplayRow
from experiments.study.statistics import Estimate, wilson_interval
from experiments.study.tables import Table, markdown, mebibytes, percent, plain, seconds, wrapped

LEGEND = (
    "Every system gets the same arrivals under the same budget. Over budget: measured bytes above "
    "the budget at the start of a step, integrated over time. Served: requests that got all their "
    "tokens; servable requests are those that some plan fits. TTFT: time from arrival to first "
    "token; TPOT: time per output token after it; both of served requests, in the time of the "
    "replay, which skips idle time. ΔNLL of output: NLL of the generated tokens under the dense "
    "model minus that of its own greedy continuation of the same prompts, nats/token, with a 95 % "
    "interval over requests. ΔNLL of plans: rise in NLL on held-out text, nats/token. Removed: "
    "blocks. Lowered: kept blocks and caches below their native level. All three are means over "
    "generated tokens. Controller: decisions and switches as a share "
    "of all work."
)
"""Meaning of the columns."""

LABELS = {
    "dense": "Dense",
    "static_gsi": "Static, GSI",
    "static_gsi_lean": "Static, lean",
    "static_shortgpt": "Static, ShortGPT",
    "greedy": "Greedy, live",
    "frontier": "Frontier table",
    "rap": "RAP policy",
    "oracle": "Oracle",
    "knapsack": "Knapsack over levels",
    **{
        name: "Uniform, {1} weights, {2} cache".format(*name.split("_")) for name in UNIFORM_SYSTEMS
    },
}
"""Display names of systems."""


def serving_table(rows: Sequence[ReplayRow]) -> Table:
    """Served requests, and memory against the budget."""
    header = ["System", "Served", "of servable", "Refused", "Failed", "Waited", "Over budget",
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
    """Latency percentiles and throughput."""
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
    """Quality of the generated text."""
    header = [
        "System",
        "ΔNLL of output",
        "ΔNLL of plans",
        "Same",
        "Accuracy",
        "Removed",
        "Lowered",
    ]
    return header, [
        [
            system_label(row.system), _delta_nll(row), _number(row.mask_loss_mean, 3),
            percent(row.same_fraction, 0), _accuracy(row), _number(row.removed_mean, 1),
            _number(row.lowered_mean, 1),
        ]
        for row in rows
    ]  # fmt: skip


def costs_table(rows: Sequence[ReplayRow]) -> Table:
    """Cost of adaptation: switches, decisions, preemptions."""
    header = ["System", "Switches", "each", "Decisions", "each", "Plans", "Preempted", "Controller"]
    return header, [
        [
            system_label(row.system), f"{row.switches}", _each(row.switch_s, row.switches),
            f"{row.decisions}", _each(row.decision_s, row.decisions), f"{row.masks}",
            f"{row.preemptions}", percent(row.controller_overhead_fraction, 2),
        ]
        for row in rows
    ]  # fmt: skip


TABLES = {
    "Served, and memory": serving_table,
    "Latency": latency_table,
    "Quality": quality_table,
    "Cost of adaptation": costs_table,
}
"""All tables by title."""


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
    """Describe what was replayed."""
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
        f"{depends.get('model', 'a model')}, under a moving budget ({budget.get('name', '-')}; "
        f"at least {mebibytes(row.budget_least_bytes)}, 100 % being "
        f"{mebibytes(depends.get('reference_bytes', 0))})."
    )


def system_label(name: str) -> str:
    """Display name of a system."""
    return LABELS.get(name, name)


def megabyte_seconds(row: ReplayRow) -> str:
    """Format the byte-seconds above the budget."""
    amount = row.violation_byte_s / 1e6
    return "0" if amount == 0 else f"{amount:{',.0f' if amount >= 100 else '.3g'}} MB s"


def _seconds(value: float | None) -> str:
    return "-" if value is None else seconds(value)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _each(total_s: float, count: int) -> str:
    return seconds(total_s / count) if count else "-"


def _delta_nll(row: ReplayRow) -> str:
    if row.loss_mean is None or row.loss_ci_low is None or row.loss_ci_high is None:
        return "-"
    return str(Estimate(row.loss_mean, row.loss_ci_low, row.loss_ci_high))


def _accuracy(row: ReplayRow) -> str:
    if row.accuracy is None:
        return "-"
    low, high = wilson_interval(row.accuracy, row.accuracy_n)
    shown = f"{percent(row.accuracy, 0)} [{100 * low:.0f}, {100 * high:.0f}]"
    return f"{shown} of {row.accuracy_n}"
