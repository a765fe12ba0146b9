"""Baselines and policies on the tasks across models: ``python -m experiments.unseen``.

It searches plans of the training models, trains networks that predict losses and policies, and
evaluates everything. A stopped run continues: networks are kept in ``runs/unseen`` and results in
the record, which has how often the test part was evaluated.
"""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import gymnasium
import numpy as np
import torch

import rap_env
from agents import unseen
from agents.unseen import Bench, SetNetwork, variant
from rap_env.leaderboard.unseen import PARTS

log = logging.getLogger(__name__)

RECORD, NETWORKS = Path("results/unseen/record.json"), Path("runs/unseen")
TASKS = {part: f"RAPLadder/Unseen-{part}-v1" for part in ("Train", "Tune", "Test")}
RUNS, PREDICTED, POLICY = (0, 8, 64), 1_500, "Policy"
UNIFORM = [{"ffn": ffn, "depth": depth} for ffn in (0.0, 100.0) for depth in (1, -1)]
"""Settings of `unseen.Uniform`, of which the best on the training models is taken."""


def benches(task: str, models: int | None = None) -> list[Bench]:
    """Each model of a task, or the first ones, with the requests of its episodes."""
    across: Any = gymnasium.make(task, every_level=True, disable_env_checker=True).unwrapped
    return [Bench.of(env) for env in across.envs[:models]]


class Record:
    """The results so far, in a file; what is in it is not evaluated again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.body: dict[str, Any] = {"test_evaluations": 0, "rows": []}
        if path.exists():
            self.body = json.loads(path.read_text(encoding="utf-8"))

    def score(self, key: Mapping[str, Any]) -> float | None:
        """The score in the row with some entries; None without it."""
        rows = [row for row in self.body["rows"] if key.items() <= row.items()]
        return float(rows[0]["score"]) if rows else None

    def evaluate(
        self, policy: Any, key: Mapping[str, Any], facts: Mapping[str, Any] | None = None
    ) -> float:
        """Evaluate a policy on a part's test text, keep the result, and return its score.

        Args:
            policy: The policy.
            key: Its ``name``, the ``part``, the ``runs``, and what else tells rows apart.
            facts: What else is in the row. If ``trained_on`` is among `key`, only so many models
                of the training part count.
        """
        if (known := self.score(key)) is not None:
            return known
        part, runs = key["part"], key["runs"]
        self.body["test_evaluations"] += part == "Test"
        result: Any = rap_env.evaluate(policy, TASKS[part], "test", name=key["name"], runs=runs)
        if part == "Train" and "trained_on" in key:
            result = replace(result, models=result.models[: key["trained_on"]])
        log.info("%s", str(result).partition("\n")[0])
        row = {
            **key,
            **(facts or {}),
            "score": result.score,
            "interval": result.interval,
            "models": [asdict(each) for each in result.models],
        }
        self.body["rows"].append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.body) + "\n", encoding="utf-8")
        return float(result.score)


def trained(models: int, seed: int) -> tuple[list[SetNetwork], list[SetNetwork], dict[str, Any]]:
    """Actors, critics, and facts of their training, which is done once."""
    path = NETWORKS / f"{models}-{seed}.pt"
    if not path.exists():
        began = time.process_time()
        trained_on = benches(TASKS["Train"], models)
        for bench in trained_on:
            bench.search(np.random.default_rng(seed), noisy=16, rounds=8, offspring=8)
        critics = unseen.predictors(trained_on, count=3, updates=PREDICTED, seed=seed)
        actors = unseen.policy(trained_on, seed=seed, note=lambda n: log.info("round %d", n))
        facts = {
            "cpu_s": round(time.process_time() - began),
            "plans": sum(len(bench.losses) for bench in trained_on),
        }
        log.info("Trained on %d models, seed %d: %s", models, seed, facts)
        path.parent.mkdir(parents=True, exist_ok=True)
        states = [[each.state_dict() for each in networks] for networks in (actors, critics)]
        torch.save((*states, facts), path)
    *states, facts = torch.load(path, weights_only=True)
    actors, critics = (unseen.new_networks(len(each), seed) for each in states)
    for network, state in zip(actors + critics, itertools.chain(*states), strict=True):
        network.load_state_dict(state)
    return actors, critics, facts


@click.command(help=__doc__)
@click.option("--part", type=click.Choice(list(TASKS)), default="Tune", help="Models to judge on.")
@click.option("--seeds", default="0", help="Seeds of policies, separated by commas.")
@click.option("--models", default="44", help="Numbers of training models, separated by commas.")
@click.option("--record", "path", type=Path, default=RECORD, help="The record.")
def main(part: str, seeds: str, models: str, path: Path) -> None:
    """Train, evaluate, and write the record."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    record = Record(path)
    baselines(record, part)
    for trained_on, seed in itertools.product(*(map(int, n.split(",")) for n in (models, seeds))):
        actors, critics, facts = trained(trained_on, seed)
        policy = variant(unseen.ActorCritic, actors=actors, critics=critics)
        own = {"seed": seed, "trained_on": trained_on}
        most = trained_on == len(PARTS[TASKS["Train"]])
        for runs in RUNS if most else RUNS[:1]:
            record.evaluate(policy, {"name": POLICY, "part": part, "runs": runs, **own}, facts)
        record.evaluate(policy, {"name": POLICY, "part": "Train", "runs": 0, **own}, facts)
        parts = {
            "Regression": variant(unseen.Predicted, critics=critics),
            "Actor alone": variant(unseen.Corrected, actors=actors),
        }
        for name, runs in itertools.product(parts, RUNS if most else ()):
            record.evaluate(parts[name], {"name": name, "part": part, "runs": runs, "seed": seed})


def tuned_uniform(record: Record) -> type[unseen.Uniform]:
    """The best of `UNIFORM` on the training models."""

    def score(given: Mapping[str, Any]) -> float:
        key = {"name": "Uniform", "part": "Train", "runs": 0, **given}
        return record.evaluate(variant(unseen.Uniform, **given), key)

    return variant(unseen.Uniform, **min(UNIFORM, key=score))


def baselines(record: Record, part: str) -> None:
    """Evaluate what is not trained."""
    for name, method in {"Uniform": tuned_uniform(record), "Knapsack": "knapsack"}.items():
        record.evaluate(method, {"name": name, "part": part, "runs": 0})
    with_runs = {
        "Noisy orders": unseen.NoisyOrders,
        "Noisy knapsacks": variant(unseen.Corrected, actors=unseen.new_networks(1, 0)),
        "Random orders": variant(unseen.NoisyOrders, scales=(100.0, 100.0)),
        "Evolution": unseen.Evolved,
    }
    for name, runs in itertools.product(with_runs, RUNS):
        record.evaluate(with_runs[name], {"name": name, "part": part, "runs": runs})


if __name__ == "__main__":
    main()
