"""Tables of servers beside each other: the replay on servers, and a neutral load generator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SERVER_LABELS = {"rap": "rap serve", "llama_cpp": "llama.cpp's server, f16 cache"}
"""Names of the load generator's reports, without the suffix, by what they measure."""


def server_replay_markdown(results: Path) -> str:
    """The tables of the replay on servers, below the page's first level."""
    from experiments.server_replay.study import STUDY

    text = STUDY.markdown(STUDY.read(results / "server_replay"))
    return text.partition("\n")[2].replace("\n## ", "\n### ")


def load_generator_markdown(results: Path) -> str:
    """A line for each report of the load generator."""
    from experiments.study.tables import markdown

    header = ["Server", "Requests", "Errors", "TTFT p50", "p95", "ITL p50", "p95", "Latency p50",
              "p95"]  # fmt: skip
    rows = []
    for name, label in SERVER_LABELS.items():
        report = json.loads((results / "load_generator" / f"{name}.json").read_text("utf-8"))
        (benchmark,) = report["benchmarks"]
        metrics = benchmark["metrics"]
        totals = metrics["request_totals"]
        rows.append([
            label, f"{totals['successful']}", f"{totals['errored'] + totals['incomplete']}",
            *_percentiles(metrics["time_to_first_token_ms"], 1e-3, 2),
            *_percentiles(metrics["inter_token_latency_ms"], 1e-3, 3),
            *_percentiles(metrics["request_latency"], 1.0, 2),
        ])  # fmt: skip
    return markdown((header, rows))


def _percentiles(metric: dict[str, Any], factor: float, digits: int) -> list[str]:
    """Median and 95th percentile of successful requests, in seconds."""
    found = metric["successful"]["percentiles"]
    return [f"{factor * found[name]:.{digits}f} s" for name in ("p50", "p95")]
