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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import gymnasium
import numpy as np
import torch

import rap_env
from agents import unseen
from agents.unseen import Bench, SetNetwork, variant
from experiments.study.plotting import FAINT, Panel, draw_series, look, panel_figure
from experiments.study.statistics import Estimate
from rap_env.leaderboard.unseen import PARTS, ModelResult, UnseenEvaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

RECORD, NETWORKS = Path("results/unseen/record.json"), Path("runs/unseen")
TASKS = {part: f"RAPLadder/Unseen-{part}-v1" for part in ("Train", "Tune", "Test")}
RUNS, PREDICTED, POLICY = (0, 8, 64), 1_500, "Policy"
MODELS = len(PARTS[TASKS["Train"]])
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

    def rows(self, **key: Any) -> list[dict[str, Any]]:
        """The rows with some entries."""
        return [row for row in self.body["rows"] if key.items() <= row.items()]

    def estimate(self, name: str, runs: int, part: str = "Test", **key: Any) -> Estimate | None:
        """Geometric mean over seeds and models with an interval over models; None without any."""
        own = {"trained_on": MODELS, **key} if name == POLICY else key
        rows = self.rows(name=name, runs=runs, part=part, **own)
        if not rows:
            return None
        scores = [[ModelResult(**model).score for model in row["models"]] for row in rows]
        means = np.exp(np.log(scores).mean(axis=0)).tolist()
        models = tuple(ModelResult("", (mean,), (1.0,)) for mean in means)
        result = UnseenEvaluation(name, part, "test", runs, models)
        return Estimate(result.score, *result.interval, len(rows))

    def by_seed(self, name: str) -> str:
        """The scores without a run on the part to be judged on, by seed."""
        rows = self.rows(name=name, runs=0, part="Test", trained_on=MODELS)
        return ", ".join(f"{row['score']:.3f}" for row in rows)

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
        if known := self.rows(**key):
            return float(known[0]["score"])
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
@click.option("--runs", "numbers", default="0,8,64", help="Runs, separated by commas.")
@click.option("--record", "path", type=Path, default=RECORD, help="The record.")
def main(part: str, seeds: str, models: str, numbers: str, path: Path) -> None:
    """Train, evaluate, and write the record."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    record, runs = Record(path), [*map(int, numbers.split(","))]
    baselines(record, part, runs)
    for trained_on, seed in itertools.product(*(map(int, n.split(",")) for n in (models, seeds))):
        actors, critics, facts = trained(trained_on, seed)
        policy = variant(unseen.ActorCritic, actors=actors, critics=critics)
        key = {"name": POLICY, "seed": seed, "trained_on": trained_on}
        parts = {"Regression": variant(unseen.Predicted, critics=critics)}
        if not seed:
            record.evaluate(policy, {**key, "part": "Train", "runs": 0}, facts)
            parts["Actor alone"] = variant(unseen.Corrected, actors=actors)
        most = trained_on == MODELS
        for number in runs if most else RUNS[:1]:
            record.evaluate(policy, {**key, "part": part, "runs": number}, facts)
            for name in parts if most else ():
                own = {"name": name, "part": part, "runs": number, "seed": seed}
                record.evaluate(parts[name], own)


def tuned_uniform(record: Record) -> type[unseen.Tries]:
    """The best of `UNIFORM` on the training models."""

    def score(given: Mapping[str, Any]) -> float:
        key = {"name": "Uniform", "part": "Train", "runs": 0, **given}
        return record.evaluate(variant(unseen.Uniform, **given), key)

    return variant(unseen.Uniform, **min(UNIFORM, key=score))


def baselines(record: Record, part: str, runs: Sequence[int]) -> None:
    """Evaluate what is not trained."""
    for name, method in {"Uniform": tuned_uniform(record), "Knapsack": "knapsack"}.items():
        record.evaluate(method, {"name": name, "part": part, "runs": 0})
    with_runs = {
        "Noisy orders": unseen.NoisyOrders,
        "Noisy knapsacks": variant(unseen.Corrected, actors=unseen.new_networks(1, 0)),
        "Random orders": variant(unseen.NoisyOrders, scales=(100.0, 100.0)),
        "Evolution": unseen.Evolved,
    }
    for name, number in itertools.product(with_runs, runs):
        record.evaluate(with_runs[name], {"name": name, "part": part, "runs": number})


def generalisation(record: Record) -> Figure:
    """Draw the score of the policy without a run against the number of training models."""
    numbers = sorted({row["trained_on"] for row in record.rows(name=POLICY)})

    def draw(axis: Axes) -> None:
        for part, label, method, beside in (
            ("Test", "16 held-out models", "rap", 1.0),
            ("Train", "its own training models", "knapsack", 1.03),
        ):
            made = [record.estimate(POLICY, 0, part, trained_on=number) for number in numbers]
            known = [estimate for estimate in made if estimate]
            ends, looks = [(e.low, e.high) for e in known], {"label": label, "capsize": 3}
            places, means = [beside * number for number in numbers], [e.mean for e in known]
            draw_series(axis, places, means, ends, color=look(method).colour, **looks)
        axis.axhline(1, color=FAINT, linewidth=0.8, linestyle=":")
        axis.set_xscale("log")
        axis.set_xticks(numbers, map(str, numbers))
        axis.minorticks_off()

    return panel_figure([Panel(draw, x="training models", y="loss / the order's")], legend=2)


if __name__ == "__main__":
    main()
