"""``python -m experiments.soak``: soak test of a server under load and a moving budget.

Clients send valid and invalid requests, cancel and disconnect, while the budget changes and masks
are random. Afterwards a sample of the answers is recomputed with a fresh model. The exit status is
1 if an invariant is violated: an answer that did not end or differs from the model's, an unexpected
status code, growing memory, or a hang.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

from experiments.config import Config
from experiments.soak.harness import SoakHarness
from experiments.soak.recording import publish

RECORD_FILE = "soak.jsonl"


def soak(config: Config, folder: Path) -> None:
    """Run the soak test and write its record; exit with status 1 if an invariant is violated.

    Raises:
        RapError: The model cannot be loaded or the extra ``serve`` is not installed.
        SystemExit: An invariant is violated.
    """
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs a line for each request
    record = SoakHarness(config, folder).run()
    path = Path(config.soak.out) if config.soak.out else folder / RECORD_FILE
    publish(path, record, summary(record))
    if not record["passed"]:
        sys.exit(1)


def summary(record: dict[str, Any]) -> str:
    """Summarize a record in a few lines of text."""
    answers, agreed, rss = record["answers"], record["agreement"], record["rss_bytes"]
    kinds = ", ".join(f"{number} {kind}" for kind, number in record["kinds"].items())
    lines = [
        f"{record['requests']} requests in {record['seconds'] / 60:.1f} minutes ({kinds});",
        f"{answers['served']} answers with {answers['tokens']} tokens, {answers['cancelled']} "
        f"cancelled, {answers['refused']} refused, {answers['preemptions']} preemptions;",
        f"{record['switches']} switches among {record['masks']} masks under "
        f"{record['budget_changes']} budgets;",
        f"{agreed['answers']} answers recomputed: {agreed['wrong_answers']} wrong, "
        f"{agreed['near_ties']} near-ties among {agreed['tokens']} tokens (under a wrong mask, "
        f"{agreed['control_wrong']} of {agreed['control_answers']} are wrong);",
        f"resident memory at rest {rss['first'] / 2**20:.0f} -> {rss['last'] / 2**20:.0f} MiB, "
        f"{100 * rss['growth']:+.2f} % between the second and the last tenth.",
    ]
    lines += [f"  problem: {problem}" for problem in record["problems"][:10]]
    failed = [name for name, good in record["checks"].items() if not good]
    lines.append("FAILED: " + ", ".join(failed) if failed else "All checks passed.")
    return "\n".join(lines)
