"""``python -m experiments.learning_curves EXAMPLE``: record learning curves of a trainer.

The trainer of ``examples/EXAMPLE.py`` runs with several seeds. As it goes on, its agent is
evaluated on all requests of its pinned task. The program needs only what the example needs.
"""

from __future__ import annotations

import importlib.util
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

import rap_env
from experiments.study.figures import Panel, panel_figure
from experiments.study.looks import look
from experiments.study.records import read_records, write_records
from experiments.study.run_folder import package_versions
from rap_env.leaderboard.entries import published_entries
from rap_env.leaderboard.tasks import pinned_task

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
EXAMPLES, FOLDER = ROOT / "examples", ROOT / "results" / "examples"

FIRST, RATIO = 512, 1.4
"""Steps before the first evaluation, and the ratio of the steps of one evaluation to the last."""

PACKAGES = (
    "gymnasium", "minari", "numpy", "ray", "rap-env", "sb3-contrib", "stable-baselines3", "torch",
    "torchrl", "d3rlpy",
)  # fmt: skip

TRAINERS = {
    "ppo_single_file": ("PPO in one file", "#C8324B", "online"),
    "sb3_maskable_ppo": ("stable-baselines3", "#2F6DB5", "online"),
    "torchrl_ppo": ("TorchRL", "#E0812F", "online"),
    "rllib_ppo": ("RLlib", "#159A74", "online"),
    "offline_cloning": ("behaviour cloning", "#8E4FA8", "offline"),
    "offline_cql": ("discrete CQL (d3rlpy)", "#6B7178", "offline"),
}
"""Label, colour and panel of each trainer that is shown."""

TASK, BASELINES = "RAPLadder/SmolLM2-Table-v1", ("Knapsack", "Uniform settings", "Frontier table")
"""The pinned task of the trainers that are shown, and the published methods beside them."""

_STEPS = {"online": "steps of the environment", "offline": "actions of the dataset learned from"}


@dataclass(frozen=True)
class CurvePoint:
    """One evaluation of an agent in training.

    Attributes:
        steps: Steps of the environment so far; offline, actions of the dataset learned from.
        delta_nll: Mean ΔNLL over the requests of the task, nats per token.
        process_s: Seconds of the process so far, without those of the evaluations.
    """

    seed: int
    steps: int
    delta_nll: float
    process_s: float


Curves = Mapping[int, list[CurvePoint]]
"""The evaluations of one trainer, by seed."""


class Watch:
    """Evaluates an agent while it is trained; the examples call it with the steps so far."""

    def __init__(self, task: str, seed: int) -> None:
        self.task, self.seed, self.steps = task, seed, 0
        self.points: list[CurvePoint] = []
        self._next = float(FIRST)
        self._started = time.process_time()

    def __call__(self, steps: int, agent: Any) -> None:
        """Evaluate the agent if it is time to."""
        self.steps = steps
        if steps >= self._next:
            self.evaluate(agent)
            self._next = steps * RATIO

    def finish(self, agent: Any) -> list[CurvePoint]:
        """Evaluate the agent at the end of its training, and return all evaluations."""
        if not self.points or self.points[-1].steps < self.steps:
            self.evaluate(agent)
        return self.points

    def evaluate(self, agent: Any) -> None:
        """Evaluate the agent now."""
        seconds = time.process_time() - self._started
        delta_nll = rap_env.evaluate(agent, self.task, name="trainer").mean_delta_nll
        self.points.append(CurvePoint(self.seed, self.steps, delta_nll, round(seconds, 2)))
        self._started = time.process_time() - seconds


def record(example: str, seeds: int, folder: Path) -> Path:
    """Train with the seeds 0, 1, ..., write versions and curves to a file, and return it."""
    spec = importlib.util.spec_from_file_location(example, EXAMPLES / f"{example}.py")
    if spec is None or spec.loader is None or not (EXAMPLES / f"{example}.py").is_file():
        raise click.BadParameter(f"{EXAMPLES} has no {example}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    points = []
    for seed in range(seeds):
        watch = Watch(module.TASK, seed)
        points += watch.finish(module.train(seed=seed, watch=watch))
    versions = {"python": platform.python_version(), **package_versions(PACKAGES)}
    path = folder / f"{example}.jsonl"
    write_records(path, [{"provenance": {**versions, "task": module.TASK}}, *map(asdict, points)])
    return path


def read_curves(folder: Path) -> dict[str, Curves]:
    """Read the records in a folder, by trainer; those of other names are left out."""
    curves: dict[str, dict[int, list[CurvePoint]]] = {}
    for name in TRAINERS:
        for line in read_records(folder / f"{name}.jsonl")[1:]:
            point = CurvePoint(**line)
            curves.setdefault(name, {}).setdefault(point.seed, []).append(point)
    return dict(curves)


def learning_curves(trainers: Mapping[str, Curves]) -> Figure:
    """Mean ΔNLL over seeds over the steps, the range over seeds as a band, baselines as lines."""

    def draw(panel: str, axis: Axes) -> None:
        for name, curves in trainers.items():
            label, colour, place = TRAINERS[name]
            if place != panel:
                continue
            steps = [point.steps for point in next(iter(curves.values()))]  # the same of all seeds
            values = np.array([[p.delta_nll for p in points] for points in curves.values()])
            low, high = values.min(axis=0), values.max(axis=0)
            axis.plot(steps, values.mean(axis=0), color=colour, label=label)
            axis.fill_between(steps, low, high, color=colour, alpha=0.12, linewidth=0)
        axis.set(xscale="log", yscale="log")
        for entry in published_entries(pinned_task(TASK).comparison):
            if entry.name in BASELINES:
                value = float(entry.scores("calibration").mean())
                style = look(str(entry.origin["method"]))
                axis.axhline(value, color=style.colour, linestyle="--", linewidth=1)
                axis.annotate(
                    entry.name if panel == "online" else "", (0.01, value), va="bottom",
                    xycoords=("axes fraction", "data"), fontsize="x-small", color=style.colour,
                )  # fmt: skip
        if axis.collections:
            axis.legend()

    parts = [
        Panel(partial(draw, name), name, f"{words} (log scale)",
              "mean ΔNLL (nats/token, log scale)" if name == "online" else "")
        for name, words in _STEPS.items()
    ]  # fmt: skip
    return panel_figure(parts, height=3.2, legend=0, sharey=True)


@click.command()
@click.argument("example")
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(min=1))
@click.option("--out", default=str(FOLDER), show_default=True, help="Folder of the records.")
def main(example: str, seeds: int, out: str) -> None:
    """Record learning curves of a trainer of examples/, such as ppo_single_file."""
    click.echo(record(example, seeds, Path(out)))


if __name__ == "__main__":
    main()
