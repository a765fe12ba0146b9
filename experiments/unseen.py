"""Baselines and policies on the tasks across models: ``python -m experiments.unseen``.

It searches plans of the training models, trains networks that predict losses, imitates the
searched plans, improves that policy by masked PPO, and evaluates everything. ``--part`` names the
task on which it evaluates; how often the test part was is in the record.
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
from agents.unseen import Bench, SetNetwork, variant
from rap_env.ladder.features import REQUEST_FEATURES, EveryLevel
from rap_env.leaderboard.unseen import PARTS

log = logging.getLogger(__name__)

RECORD = Path("results/unseen/record.json")
TASKS = {part: f"RAPLadder/Unseen-{part}-v1" for part in ("Train", "Tune", "Test")}
RUNS, IMITATED, PREDICTED = (0, 8, 64), 2_500, 1_500
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


def new_network(seed: int) -> SetNetwork:
    """An untrained network."""
    torch.manual_seed(seed)
    return SetNetwork(len(EveryLevel.features), len(REQUEST_FEATURES))


def predictors(models: Sequence[Bench], seeds: int, updates: int) -> list[SetNetwork]:
    """Networks that predict losses of plans from the searched plans of models."""
    data, networks = unseen.measured_plans(models), []
    for seed in range(seeds):
        networks.append(new_network(seed))
        unseen.fit(networks[-1], data, unseen.prediction_loss, updates, 256, seed)
    return networks


def policy(models: Sequence[Bench], seed: int, imitated: int, improved: int) -> SetNetwork:
    """A policy from searched plans, improved on the models."""
    network = new_network(seed)
    states = unseen.teacher_states(models, ways=6, most=2, seed=seed)
    unseen.fit(network, states, unseen.imitation_loss, imitated, 256, seed)

    def note(update: int, mean: float) -> None:
        if update % 10 == 9:
            log.info("update %d: mean reward %.3f", update + 1, mean)

    unseen.improve(network, models, improved, 1e-3, seed, note)
    return network


class Record:
    """The results so far, in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.body = {"test_evaluations": 0, "rows": []}
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
@click.option("--seeds", default=1, help="Policies that are trained.")
@click.option("--models", default=44, help="Training models.")
@click.option("--improved", default=150, help="Rollouts of PPO.")
def main(part: str, seeds: int, models: int, improved: int) -> None:
    """Train, evaluate, and write the record."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    record, began = Record(RECORD), time.process_time()
    trained_on = benches(TASKS["Train"], models)
    for number, bench in enumerate(trained_on):
        bench.search(np.random.default_rng(number), noisy=16, rounds=8, offspring=8)
    searched_s = time.process_time() - began
    log.info("%d plans in %.0f CPU s", sum(len(b.losses) for b in trained_on), searched_s)
    if models == len(PARTS[TASKS["Train"]]):
        baselines(record, trained_on, part)
    for seed in range(seeds):
        began = time.process_time()
        network = policy(trained_on, seed, IMITATED, improved)
        cpu_s = round(time.process_time() - began + searched_s)
        for runs, judged in [(0, part), (8, part), (64, part), (0, "Train")]:
            method = variant(unseen.Acting, network=network)
            record.evaluate(
                "Policy", method, judged, runs, seed=seed, trained_on=models, cpu_s=cpu_s
            )


def baselines(record: Record, models: Sequence[Bench], part: str) -> None:
    """Evaluate what is no policy."""
    networks = predictors(models, seeds=3, updates=PREDICTED)
    tuned = {
        json.dumps(given): record.evaluate(
            "Uniform", variant(unseen.Uniform, **given), "Train", 0, **given
        )
        for given in UNIFORM
    }
    uniform = variant(unseen.Uniform, **json.loads(min(tuned, key=tuned.__getitem__)))
    regression = variant(unseen.Predicted, networks=networks)
    without: dict[str, Any] = {"Uniform": uniform, "Knapsack": "knapsack"}
    with_runs = {
        "Noisy orders": unseen.NoisyOrders,
        "Random orders": unseen.RandomOrders,
        "Evolution": unseen.Evolved,
        "Regression": regression,
    }
    for name, method in without.items():
        record.evaluate(name, method, part, 0)
    for name, method in with_runs.items():
        for runs in RUNS:
            record.evaluate(name, method, part, runs)


if __name__ == "__main__":
    main()
