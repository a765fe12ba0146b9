"""The report's sentences, made from its numbers so that they can never disagree with them."""

from __future__ import annotations

from experiments.comparison.labels import TIMES, look
from experiments.comparison.report_data import ReportData
from experiments.comparison.summaries import Comparison, Summary
from experiments.comparison.tables import counted, number, percent, seconds


def subtitle(data: ReportData) -> str:
    """Model, machine and date in a line."""
    parts = []
    if data.profile:
        facts = data.profile["facts"]
        parts.append(f"{facts['name']} ({facts['dtype']}, {facts['num_layers']} layers)")
    elif data.repair_notes:
        parts.append(data.repair_notes[-1]["model"])
    notes = data.evaluations or [run.facts for run in data.runs] or data.repair_notes
    if notes:
        note = notes[-1]
        parts.append(str(note["provenance"]["machine"].get("cpu", "")))
        parts.append(str(note.get("finished", note["starts"][-1]))[:10])
        if note["provenance"]["git"]:
            parts.append(f"commit {note['provenance']['git']['commit'][:8]}")
    return " · ".join(part for part in parts if part)


def abstract(data: ReportData) -> list[str]:
    """What the page is about, for a reader who comes from nowhere."""
    return [
        "A language model in service lives under a memory limit that moves. What fills the memory "
        "moves too: with short requests it is the weights, most of them in the feed-forward (FFN) "
        "blocks; with many long requests it is the KV cache, all of it made by the attention "
        "blocks. This report compares ways to decide, for each request and budget, which blocks "
        "to leave out, so that the model fits and loses as little quality as possible.",
    ]


def key_numbers(data: ReportData) -> list[dict[str, str]]:
    """A few numbers for the top of the page."""
    comparison = data.comparison
    if not comparison or not comparison.summaries:
        return []
    found = []
    policy, best, rest = comparison.main_policy, _best_baseline(comparison), _random(comparison)
    if policy:
        found.append(
            _key(f"{policy.loss.mean:.3f}", f"nats/token lost by {look(policy.method).label}, "
                 f"95 % interval {_interval(policy)}")
        )  # fmt: skip
    if best:
        found.append(
            _key(f"{best.loss.mean:.3f}", f"lost by {look(best.method).label}, the best baseline, "
                 f"{_interval(best)}")
        )  # fmt: skip
    if rest:
        found.append(_key(f"{rest.loss.mean:.2f}", f"lost by random removal, {_interval(rest)}"))
    if policy and best:
        found.append(
            _key(f"{seconds(policy.decision_s)}", "for the policy to decide on a request, with "
                 f"{number(policy.evaluations)} model evaluations; {look(best.method).label}: "
                 f"{seconds(best.decision_s)}, {number(best.evaluations)}")
        )  # fmt: skip
    return found


def findings(data: ReportData) -> list[str]:
    """What the comparison says, in words, for and against the policy."""
    comparison = data.comparison
    policy = comparison.main_policy if comparison else None
    if not comparison or not policy:
        return []
    name = look(policy.method).label
    better: list[str] = []
    worse: list[str] = []
    even: list[str] = []
    for other in comparison.summaries:
        if other.method in comparison.learned or not other.fits_all:
            continue
        difference = comparison.difference(policy.method, other.method)
        place = better if difference.high < 0 else worse if difference.low > 0 else even
        place.append(look(other.method).label)
    clauses = []
    if better:
        clauses.append(f"loses less than {_join(better)}")
    if even:
        clauses.append(f"cannot be told apart from {_join(even)}")
    if worse:
        clauses.append(f"loses more than {_join(worse)}")
    missing = [look(s.method).label for s in comparison.summaries if not s.fits_all]
    texts = [
        f"On {counted(len(comparison.cells), 'pair')} of request and budget, {name} "
        f"{_join(clauses)} (paired over held-out windows, 95 % level)."
        if clauses
        else f"{name} has no baseline to be compared with."
    ]
    if missing:
        texts.append(
            f"{_join(missing)} cannot meet every budget, so no loss of "
            f"{'theirs' if len(missing) > 1 else 'its'} compares with the others'."
        )
    if policy.loss.seeds == 1:
        texts.append(
            f"{name} was trained with a single seed: the interval covers the text, not the luck "
            "of training."
        )
    return texts


def grid_words(comparison: Comparison) -> str:
    """The grid in a sentence."""
    shapes = ", ".join(f"{batch} {TIMES} {tokens:,}" for batch, tokens in comparison.shapes)
    budgets = ", ".join(percent(budget, 0) for budget in comparison.budgets)
    return (
        f"Requests (batch {TIMES} tokens of prompt and answer): {shapes}. Budgets: {budgets} of "
        "what the dense model needs for the request."
    )


def text_words(text: dict[str, object]) -> str:
    """Where a text comes from and how much of it there is, from its provenance."""
    if not text:
        return "unknown"
    source = "written by the dense model itself" if text["source"] == "self" else text["source"]
    return f"{source}, {text['windows']} windows of {text['window_tokens']} tokens"


def _best_baseline(comparison: Comparison) -> Summary | None:
    return next(
        (s for s in comparison.summaries if s.method in comparison.baselines and s.fits_all), None
    )


def _random(comparison: Comparison) -> Summary | None:
    return next((s for s in comparison.summaries if s.method == "random"), None)


def _key(value: str, label: str) -> dict[str, str]:
    return {"value": value, "label": label}


def _interval(summary: Summary) -> str:
    return f"{summary.loss.low:.3f} to {summary.loss.high:.3f}"


def _join(words: list[str]) -> str:
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"
