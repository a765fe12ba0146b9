"""``python -m experiments.soak``: does a server stay right, small and alive for a long time?

Clients of all manners (good ones, ones that cancel, vanish, or send nonsense) ask a real server
whose budget jumps about and whose masks are random. Then a sample of the answers is computed
again with a fresh model. The exit status is 1 if anything was wrong: an answer that never
ended or was not the model's, a status that should not be, memory that grew, or a hang.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

from experiments.comparison.records import append_record
from experiments.config import Config
from experiments.console import say
from experiments.soak.trial import Trial

RECORD_FILE = "soak.jsonl"


def soak(config: Config, folder: Path) -> None:
    """Run the soak, write its record, and end the program with status 1 if anything was wrong.

    Args:
        config: All settings.
        folder: The run's folder.

    Raises:
        RapError: The model cannot be had or the extra ``serve`` is not installed.
        SystemExit: Something was wrong.
    """
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it has a line for each request
    record = run_soak(config, folder)
    path = Path(config.soak.out) if config.soak.out else folder / RECORD_FILE
    append_record(path, record)
    say(summary(record))
    say(f"The record is in {path}.")
    if not record["passed"]:
        sys.exit(1)


def run_soak(config: Config, folder: Path) -> dict[str, Any]:
    """Run the soak; its record.

    Raises:
        RapError: As for `soak`.
    """
    trial = Trial(config, folder)
    trial.run()
    return trial.record()


def summary(record: dict[str, Any]) -> str:
    """A soak for a person."""
    answers, agreed, rss = record["answers"], record["agreement"], record["rss_bytes"]
    kinds = ", ".join(f"{number} {kind}" for kind, number in record["kinds"].items())
    lines = [
        f"{record['requests']} requests in {record['seconds'] / 60:.1f} minutes ({kinds});",
        f"{answers['served']} answers with {answers['tokens']} tokens, {answers['cancelled']} "
        f"cancelled, {answers['refused']} refused, {answers['preemptions']} preemptions;",
        f"{record['switches']} switches among {record['masks']} masks under "
        f"{record['budget_changes']} budgets;",
        f"{agreed['answers']} answers computed again: {agreed['wrong_answers']} wrong, "
        f"{agreed['near_ties']} near-ties among {agreed['tokens']} tokens (under a wrong mask, "
        f"{agreed['control_wrong']} of {agreed['control_answers']} would be wrong);",
        f"resident memory at rest {rss['first'] / 2**20:.0f} -> {rss['last'] / 2**20:.0f} MiB, "
        f"{100 * rss['growth']:+.2f} % between the second and the last tenth.",
    ]
    lines += [f"  problem: {problem}" for problem in record["problems"][:10]]
    failed = [name for name, good in record["checks"].items() if not good]
    lines.append("FAILED: " + ", ".join(failed) if failed else "All checks passed.")
    return "\n".join(lines)
