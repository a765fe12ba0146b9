"""Make the pinned tasks and the entries of our methods from the records in ``results/``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from experiments.comparison.records import ResultRow, rows_below
from experiments.study.looks import look
from rap_env.artifacts import atomic_write
from rap_env.leaderboard.entries import ENTRIES, Entry, Run
from rap_env.request import Request

TASKS_FILE = ENTRIES.parent / "tasks.json"
LEFT_OUT = ("dense",)
"""Methods whose plans exceed the budgets."""


@dataclass(frozen=True)
class Comparison:
    """What `publish` makes a pinned comparison from.

    Attributes:
        name: Its name.
        environment: The environment.
        records: Folder of the records.
        arguments: Arguments of the environment in all tasks.
        tasks: Further arguments by the name of the task; the first task has the score table.
    """

    name: str
    environment: str
    records: str
    arguments: Mapping[str, Any]
    tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def _small(kind: str) -> Comparison:
    """The comparison on one of the models of six layers, whose masks are all measured."""
    workload = {
        "name": "grid",
        "batch_sizes": [1, 2, 4],
        "seq_lens_tokens": [128, 512, 1024, 2048],
        "budget_fractions": [0.575, 0.625, 0.675, 0.725, 0.775, 0.825, 0.875, 0.925],
    }
    return Comparison(
        f"Small{kind.title()}-v0",
        "RAPPrune-v0",
        f"small_{kind}",
        {"workload": workload, "reward": "perplexity"},
        {f"RAPPrune/Small{kind.title()}-Table-v0": {"model": f"score_table:small-{kind}"}},
    )


TABLE = {"model": "score_table:smollm2-135m"}
COMPARISONS = (
    Comparison(
        "SmolLM2-v0",
        "RAPPrune-v0",
        "learning",
        {
            "workload": {
                "name": "azure-conv",
                "max_batch_size": 16,
                "budget_fraction_range": [0.55, 0.95],
            },
            "reward": "perplexity",
        },
        {
            "RAPPrune/SmolLM2-Table-v0": TABLE,
            "RAPPrune/SmolLM2-v0": {
                "model": "smollm2-135m",
                "dtype": "bfloat16",
                "gsi_removals": 24,
                "calibration": {
                    "source": "data/wikitext/validation.jsonl",
                    "field": "page",
                    "windows": 4,
                    "window_tokens": 128,
                    "sha256": "5dc8bd260b4404adace1586f3865c69207cc80193ad56ca19dd406fb8b426145",
                },
            },
        },
    ),
    Comparison(
        "SmolLM2-v1",
        "RAPPrune-v1",
        "tight",
        {"workload": {"name": "tight"}, "reward": "perplexity"},
        {
            "RAPPrune/SmolLM2-Table-v1": TABLE,
            "RAPPrune/SmolLM2-v1": {"model": "smollm2-135m@pypi", "dtype": "bfloat16"},
        },
    ),
    Comparison(
        "Gemma3-270M-v1",
        "RAPPrune-v1",
        "tight_gemma",
        {
            "workload": {"name": "tight", "lowered_share_range": [0.75, 1.6]},
            "reward": "perplexity",
        },
        {"RAPPrune/Gemma3-270M-Table-v1": {"model": "score_table:gemma3-270m"}},
    ),
    _small("uniform"),
    _small("unequal"),
)

_THRESHOLD_REQUESTS = 1000


def make_entries(comparison: Comparison, rows: Sequence[ResultRow]) -> list[Entry]:
    """Return an entry for each method, with the plans of all its seeds."""
    requests = requests_of(rows)
    methods = dict.fromkeys(row.method for row in rows if row.method not in LEFT_OUT)
    return [_entry(comparison, method, rows, requests) for method in methods]


def requests_of(rows: Sequence[ResultRow]) -> list[Request]:
    """Return the requests of some rows, in their order."""
    return list(dict.fromkeys(Request(*row.shape, row.budget_bytes) for row in rows))


def _entry(
    comparison: Comparison, method: str, rows: Sequence[ResultRow], requests: Sequence[Request]
) -> Entry:
    own = [row for row in rows if row.method == method]
    runs = []
    for seed in dict.fromkeys(row.seed for row in own):
        at = {Request(*row.shape, row.budget_bytes): row for row in own if row.seed == seed}
        chosen = [at[request] for request in requests]
        runs.append(
            Run(
                seed,
                tuple(row.plan.levels for row in chosen),
                {
                    "calibration": tuple(row.loss_calibration for row in chosen),
                    "test": tuple(row.loss for row in chosen),
                },
                tuple(row.fits for row in chosen),
            )
        )
    return Entry(
        name=look(method).label,
        comparison=comparison.name,
        description=look(method).what,
        runs=tuple(runs),
        evaluations=float(np.median([row.evaluations for row in own])),
        setup_evaluations=max(row.setup_evaluations for row in own),
        decision_s=float(np.median([row.decision_s for row in own])),
        origin={"records": f"results/{comparison.records}", "method": method},
    )


def mean_return(comparison: Comparison) -> float:
    """Return the mean return of the best measured plans on requests of a comparison's workload."""
    table = next(iter(comparison.tasks.values()))
    env: Any = gymnasium.make(comparison.environment, **comparison.arguments, **table).unwrapped
    scorer = env.context.scorer
    env.reset(seed=0)
    returns = []
    for _ in range(_THRESHOLD_REQUESTS):
        env.reset()
        best = env.context.best_measured(env.request)
        returns.append(scorer.dense_nll - scorer.nll(best))
    return float(np.mean(returns))


def grid_rows(comparison: Comparison, results: Path) -> list[ResultRow]:
    """Return the rows of a comparison's grid, from its records below a folder."""
    rows = rows_below(results / comparison.records / "evaluate")
    return [row for row in rows if row.part == "grid"]


def publish(results: Path) -> int:
    """Make the pinned tasks and our entries from the records; return the number of entries."""
    described = {}
    for comparison in COMPARISONS:
        rows = grid_rows(comparison, results)
        depends_on = rows[0].provenance["depends_on"]
        described[comparison.name] = {
            "environment": comparison.environment,
            "arguments": comparison.arguments,
            "tasks": comparison.tasks,
            "requests": [
                [one.batch_size, one.seq_len_tokens, one.budget_bytes] for one in requests_of(rows)
            ],
            "calibration_sha256": depends_on["calibration_sha256"],
            "test_text": depends_on["report_text"],
            "reward_threshold": mean_return(comparison),
        }
        for entry in make_entries(comparison, rows):
            entry.save(ENTRIES / comparison.name / f"{entry.origin['method']}.json")
    with atomic_write(TASKS_FILE) as file:
        file.write((json.dumps(described, indent=1) + "\n").encode())
    return sum(1 for _ in ENTRIES.rglob("*.json"))
