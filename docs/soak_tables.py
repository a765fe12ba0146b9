"""Tables of the soak tests of the server, made from their records."""

from __future__ import annotations

import json
from pathlib import Path


def soak_table(results: Path) -> str:
    """What the soak test counted."""
    from experiments.study.tables import percent

    record = json.loads((results / "soak.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    agreement, memory = record["agreement"], record["rss_bytes"]
    rows = {
        "requests": f"{record['requests']:,} in {record['seconds'] / 60:.0f} minutes",
        "by kind": ", ".join(f"{count:,} {kind}" for kind, count in record["kinds"].items()),
        "changes of the budget": f"{record['budget_changes']:,}",
        "mask switches": f"{record['switches']:,} among {record['masks']:,} masks",
        "wrong answers": f"{agreement['wrong_answers']} of {agreement['answers']}",
        "wrong answers of the control": (
            f"{agreement['control_wrong']} of {agreement['control_answers']}"
        ),
        "growth of resident memory at rest": f"{percent(memory['growth'])} (target: at most 2 %)",
        "checks that failed": ", ".join(k for k, ok in record["checks"].items() if not ok)
        or "none",
    }
    return _table("Soak", rows)


def floor_table(results: Path) -> str:
    """What a server with a floor of quality answered under budgets that jump."""
    from experiments.study.tables import mebibytes

    path = results / "soak_floor.jsonl"
    record = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
    outcomes = record["outcomes"]
    refused = {name: count for name, count in outcomes.items() if name != "answered"}
    least, most = map(mebibytes, record["budgets_bytes"])
    rows = {
        "requests": f"{record['requests']:,} in {record['seconds'] / 60:.0f} minutes",
        "budgets": f"{record['budget_changes']:,}, from {least} to {most}",
        "answered": f"{outcomes['answered']:,}",
        "refused with 503 and the reason": ", ".join(f"{n:,} {k}" for k, n in refused.items()),
        "refused otherwise": f"{len(record['problems'])}",
        "passes below the floor": f"{record['passes_below_floor']} of {record['passes']:,}",
        "largest predicted rise of a pass": (
            f"{record['max_delta_nll_of_a_pass']:.3f} of {record['max_delta_nll']} nats per token"
        ),
        "smallest budget of a pass": mebibytes(record["least_budget_bytes_of_a_pass"]),
        "passes above their budget": f"{record['passes_over_budget']}",
    }
    return _table("Floor of quality", rows)


def _table(title: str, rows: dict[str, str]) -> str:
    body = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    return f"| {title} | |\n| :--- | :--- |\n{body}"
