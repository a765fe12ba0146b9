"""Baselines and policies on the tasks across models: ``python -m experiments.unseen``.

It searches plans of the training models, trains networks that predict losses and policies, and
evaluates everything. ``--part`` names the task on which it evaluates; how often the test part was
is in the record.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import gymnasium
import numpy as np
import torch

import rap_env
from agents import unseen
from agents.unseen import Bench, variant

log = logging.getLogger(__name__)

RECORD = Path("results/unseen/record.json")
TASKS = {part: f"RAPLadder/Unseen-{part}-v1" for part in ("Train", "Tune", "Test")}
RUNS, PREDICTED, POLICY = (0, 8, 64), 1_500, "Policy"
UNIFORM = [
    {"ffn": ffn, "depth": depth, "removal": removal}
    for ffn in (-100.0, 0.0, 100.0)
    for depth in (1, -1)
    for removal in (0.0, -1.5)
]
"""Settings of `unseen.Uniform`, of which the best on the training models is taken."""


def benches(task: str, models: int | None = None) -> list[Bench]:
    """Each model of a task, or the first ones, with the requests of its episodes."""
    across: Any = gymnasium.make(task, every_level=True, disable_env_checker=True).unwrapped
    return [Bench.of(env) for env in across.envs[:models]]


class Record:
    """The results so far, in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.body: dict[str, Any] = {"test_evaluations": 0, "rows": []}
        if path.exists():
            self.body = json.loads(path.read_text(encoding="utf-8"))

    def evaluate(self, name: str, policy: Any, part: str, runs: int, **facts: Any) -> float:
        """Evaluate a policy on a part's test text, keep the result, and return its score."""
        self.body["test_evaluations"] += part == "Test"
        result: Any = rap_env.evaluate(policy, TASKS[part], "test", name=name, runs=runs)
        log.info("%s", str(result).partition("\n")[0])
        row = {
            "name": name,
            "part": part,
            "runs": runs,
            **facts,
            "score": result.score,
            "interval": result.interval,
            "models": [asdict(each) for each in result.models],
        }
        same = {"name": name, "part": part, "runs": runs, **facts}
        kept = [r for r in self.body["rows"] if {k: r.get(k) for k in same} != same]
        self.body["rows"] = [*kept, row]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.body) + "\n", encoding="utf-8")
        return float(result.score)


@click.command(help=__doc__)
@click.option("--part", type=click.Choice(list(TASKS)), default="Tune", help="Models to judge on.")
@click.option("--seeds", default="0", help="Seeds of policies, separated by commas.")
@click.option("--models", default=44, help="Training models.")
@click.option("--with-baselines/--only-policies", default=True, help="What is evaluated.")
def main(part: str, seeds: str, models: int, with_baselines: bool) -> None:
    """Train, evaluate, and write the record."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    record = Record(RECORD)
    for number, seed in enumerate(map(int, seeds.split(","))):
        began = time.process_time()
        trained_on = benches(TASKS["Train"], models)
        for bench in trained_on:
            bench.search(np.random.default_rng(seed), noisy=16, rounds=8, offspring=8)
        searched_s = time.process_time() - began
        log.info("%d plans in %.0f CPU s", sum(len(b.losses) for b in trained_on), searched_s)
        if with_baselines and not number:
            baselines(record, trained_on, part)
        began = time.process_time()
        networks = unseen.policy(trained_on, seed=seed, note=lambda n: log.info("round %d", n))
        facts = {
            "seed": seed,
            "trained_on": models,
            "cpu_s": round(time.process_time() - began + searched_s),
            "plans": sum(len(bench.losses) for bench in trained_on),
        }
        for runs, judged in [*((runs, part) for runs in RUNS), (0, "Train")]:
            method = variant(unseen.Corrected, networks=networks)
            record.evaluate(POLICY, method, judged, runs, **facts)


def baselines(record: Record, models: Sequence[Bench], part: str) -> None:
    """Evaluate what is no policy."""
    tuned = {
        json.dumps(given): record.evaluate(
            "Uniform", variant(unseen.Uniform, **given), "Train", 0, **given
        )
        for given in UNIFORM
    }
    uniform = variant(unseen.Uniform, **json.loads(min(tuned, key=tuned.__getitem__)))
    for name, method in {"Uniform": uniform, "Knapsack": "knapsack"}.items():
        record.evaluate(name, method, part, 0)
    networks = unseen.predictors(models, count=3, updates=PREDICTED, seed=0)
    with_runs = {
        "Noisy orders": unseen.NoisyOrders,
        "Noisy knapsacks": variant(unseen.Corrected, networks=unseen.new_networks(1, 0)),
        "Random orders": variant(unseen.NoisyOrders, scales=(100.0, 100.0)),
        "Evolution": unseen.Evolved,
        "Regression": variant(unseen.Predicted, networks=networks),
    }
    for name, kind in with_runs.items():
        for runs in RUNS:
            record.evaluate(name, kind, part, runs)


if __name__ == "__main__":
    main()
