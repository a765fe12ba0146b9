"""What a learned policy is to reach on the evaluation's grid, and what it reached."""

from __future__ import annotations

from experiments.comparison.labels import look
from experiments.comparison.pairwise import Verdict, relative_on, verdict_on
from experiments.comparison.summaries import Cell, Comparison, Summary
from experiments.comparison.tables import Table, number, relative_words, signed_percent

WITHIN = {"evolutionary": 0.02, "frontier": 0.02, "oracle": 0.03}
"""Share of these methods' mean loss that a policy may lose more than they do."""

COMPETING_GAIN = 0.1
"""Share of the GSI order's loss to be saved where weights and cache compete."""

FASTER = 1000.0
"""Times quicker than the greedy search that a decision is to be."""


def goals_table(comparison: Comparison) -> Table | None:
    """Goals with what the best learned method reached; None where no goal was measured."""
    policy = comparison.main_policy
    if policy is None:
        return None
    rows = [*_against_gsi(comparison, policy), *_against_greedy(comparison, policy)]
    for other in WITHIN:
        rows += _within(comparison, policy, other)
    header = [f"Goal of {look(policy.method).label}", "Reached", "Target", "Met"]
    return (header, rows) if rows else None


def competing_cells(comparison: Comparison) -> list[Cell]:
    """Cells at which the greedy search per byte removes blocks of both kinds.

    There the bytes of weights compete with those of the cache; elsewhere one kind of block is
    the only sensible choice, and little is left to decide.
    """
    return [
        cell
        for cell in comparison.cells
        if (rows := comparison.at("greedy_per_byte", cell))
        and all(row.attn_removed and row.ffn_removed for row in rows)
    ]


def _against_gsi(comparison: Comparison, policy: Summary) -> list[list[str]]:
    found = verdict_on(comparison, policy.method, "gsi")
    if not found:
        return []
    rows = [
        _row("loses less than the GSI order in the mean", _relative(found), "interval below 0",
             found.difference.high < 0),
        _row("loses more than the GSI order at no pair", f"at {found.cells.worse}", "at none",
             found.cells.worse == 0),
    ]  # fmt: skip
    some = relative_on(comparison, policy.method, "gsi", competing_cells(comparison))
    if some:
        rows.append(
            _row("the same where weights and cache compete", relative_words(some),
                 f"{signed_percent(-COMPETING_GAIN, 0)} or less", some.mean <= -COMPETING_GAIN)
        )  # fmt: skip
    return rows


def _against_greedy(comparison: Comparison, policy: Summary) -> list[list[str]]:
    found = verdict_on(comparison, policy.method, "greedy_per_byte")
    if not found:
        return []
    greedy = next(s for s in comparison.summaries if s.method == "greedy_per_byte")
    times = greedy.decision_s / max(policy.decision_s, 1e-9)
    return [
        _row("not above greedy per byte in the mean", _relative(found), "0 or less",
             found.difference.mean <= 0),
        _row("quicker to decide than greedy per byte", f"{number(times)} times",
             f"{number(FASTER)} times", times >= FASTER),
        _row("model evaluations to decide", number(policy.evaluations), "none",
             policy.evaluations == 0),
    ]  # fmt: skip


def _within(comparison: Comparison, policy: Summary, other: str) -> list[list[str]]:
    found = verdict_on(comparison, policy.method, other)
    if not found or not found.relative:
        return []
    most = WITHIN[other]
    goal = f"loss in the mean against {look(other).label}"
    target = f"{signed_percent(most, 0)} or less"
    return [_row(goal, relative_words(found.relative), target, found.relative.mean <= most)]


def _relative(found: Verdict) -> str:
    return relative_words(found.relative) if found.relative else f"{found.difference} nats/token"


def _row(goal: str, reached: str, target: str, met: bool) -> list[str]:
    return [goal, reached, target, "yes" if met else "no"]
