"""Invented records in the real schema, so that reports can be tested without a model.

The numbers follow a rule (better methods lose less, tighter budgets lose more), so that tests
know what a report has to say about them. They are no measurements.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from experiments.comparison.result_rows import ResultRow
from experiments.study.json_records import append_record

LAYERS, WINDOWS = 30, 16
SHAPES = ((1, 128), (4, 1024), (8, 2048))
BUDGETS = (0.9, 0.8, 0.7)
FACTORS = {
    "maskable_ppo": 0.42, "greedy_per_byte": 0.36, "gsi": 0.45, "knapsack": 0.8, "one_shot": 0.95,
    "block_influence": 1.3, "attention_only": 0.9, "ffn_only": 2.2, "random": 5.0,
}  # fmt: skip
"""Loss in nats per token of each method at a budget of 90 %."""

DEPENDS = {
    "model_fingerprint": "f" * 64,
    "dtype": "bfloat16",
    "calibration": {"source": "self", "windows": 8, "window_tokens": 128, "sha256": "a" * 64},
    "calibration_sha256": "a" * 64,
    "report_text": {"source": "self", "windows": WINDOWS, "window_tokens": 128},
    "report_sha256": "b" * 64,
    "tasks": {
        "names": ["task_one", "task_two"],
        "limit": 20,
        "chance": {"task_one": 0.5, "task_two": 0.25},
    },
}


def make_row(
    method: str, shape: tuple[int, int], budget: float, *, seed: int | None = None, **changes: Any
) -> ResultRow:
    """One row; the same arguments give the same row."""
    dense = method == "dense"
    rng = np.random.default_rng([len(method), shape[0], shape[1], round(100 * budget), seed or 0])
    level = 0.0 if dense else FACTORS.get(method, 1.0) * (1 + 8 * (0.9 - budget))
    hardness = np.random.default_rng(7).normal(0, 0.1, WINDOWS)  # windows are hard for all alike
    losses = level * (1 + hardness + rng.normal(0, 0.03, WINDOWS) + 0.05 * (seed or 0))
    removed = 0 if dense else round((1 - budget) * 50)
    order = rng.permutation(2 * LAYERS)[:removed]
    names = sorted(f"layer{i // 2:02d}.{('attn', 'ffn')[i % 2]}" for i in order)
    peak = 300 * 2**20
    fits = not dense and not (method == "attention_only" and budget < 0.8)
    values: dict[str, Any] = {
        "method": method, "seed": seed,
        "request": {"batch_size": shape[0], "seq_len_tokens": shape[1]},
        "budget_fraction": budget, "budget_bytes": int(peak * budget),
        "peak_bytes": int(peak * budget) - 1000 if fits else peak, "fits": fits,
        "levels": dict.fromkeys(names, "removed"),
        "calibration_delta_nll": float(losses.mean()) * 0.9, "delta_nll": float(losses.mean()),
        "delta_nll_ci_low": float(losses.mean()) - 0.05,
        "delta_nll_ci_high": float(losses.mean()) + 0.05,
        "window_delta_nll": losses.tolist(),
        "accuracies": {"task_one": 0.9 / (1 + level / 4), "task_two": 0.7 / (1 + level / 5)},
        "decision_s": 0.004 if "ppo" in method else 2.5 if "greedy" in method else 0.0006,
        "evaluations": 240 if "greedy" in method else 0,
        "setup_evaluations": 1500 if method in ("gsi", "maskable_ppo") else 61,
        "provenance": {"depends_on": {**DEPENDS, "method": {"baseline": method}}},
    }  # fmt: skip
    return ResultRow(**{**values, **changes})


def make_rows(agent_seeds: int = 1) -> list[ResultRow]:
    """A whole grid with every kind of method."""
    rows = []
    for method in ["dense", *FACTORS]:
        seeds: list[int | None] = [None]
        if method == "random":
            seeds = [0, 1, 2]
        if method == "maskable_ppo":
            seeds = [*range(agent_seeds)]
        for seed in seeds:
            rows += [make_row(method, s, b, seed=seed) for s in SHAPES for b in BUDGETS]
    return rows


def write_root(root: Path, agent_seeds: int = 1) -> Path:
    """A comparison's folder as the stages leave it."""
    for row in make_rows(agent_seeds):
        append_record(root / "evaluate" / "results.jsonl", asdict(row), durable=False)
    _write_run(root / "evaluate", rows=90)
    for seed in range(agent_seeds):
        folder = root / "train" / f"maskable_ppo-s{seed}"
        _write_run(
            folder,
            method="maskable_ppo",
            seed=seed,
            timesteps=6000,
            evaluations=590,
            training_s=412.0,
        )
        rng = np.random.default_rng(seed)
        lines = []
        for step in range(10, 6000, 10):
            loss = 0.8 + 4 * np.exp(-step / 1500) + rng.gamma(1.0, 0.3)
            lines.append({"step": step, "episode/delta_nll": loss, "episode/return": -loss - 0.02})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "metrics.jsonl").write_text(text)
    return root


def _write_run(folder: Path, **facts: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "starts": ["2026-01-01T12:00:00+00:00"], "finished": "2026-01-01T12:10:00+00:00",
        "seconds": 612.0, **facts,
        "provenance": {
            "python": "3.11.9", "packages": {"torch": "2.13.0", "transformers": "5.24.0"},
            "machine": {"cpu": "An Example CPU", "threads": 2},
            "git": {"commit": "c" * 40, "dirty": False}, "seeds": {"run": 0, "calibration": 0},
        },
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed": 0}))
