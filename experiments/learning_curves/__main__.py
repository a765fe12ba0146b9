"""``python -m experiments.learning_curves EXAMPLE``: record learning curves of a trainer.

The trainer of ``examples/EXAMPLE.py`` runs with several seeds. As it goes on, its agent is
evaluated on all requests of its pinned task. The program needs only what the example needs.
"""

from __future__ import annotations

import importlib.util
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import click

import rap_env
from experiments.learning_curves.records import FOLDER, CurvePoint, write_points

EXAMPLES = Path(__file__).parents[2] / "examples"
FIRST, RATIO = 512, 1.4
"""Steps before the first evaluation, and the ratio of the steps of one evaluation to the last."""

PACKAGES = (
    "gymnasium", "minari", "numpy", "ray", "rap-env", "sb3-contrib", "stable-baselines3", "torch",
    "torchrl", "d3rlpy",
)  # fmt: skip


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
    """Train with the seeds 0, 1, ..., write the curves to a file in a folder, and return it."""
    spec = importlib.util.spec_from_file_location(example, EXAMPLES / f"{example}.py")
    if spec is None or spec.loader is None or not (EXAMPLES / f"{example}.py").is_file():
        raise click.BadParameter(f"{EXAMPLES} has no {example}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    points = []
    for seed in range(seeds):
        watch = Watch(module.TASK, seed)
        points += watch.finish(module.train(seed=seed, watch=watch))
    return write_points(folder / f"{example}.jsonl", points, {**versions(), "task": module.TASK})


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


@click.command()
@click.argument("example")
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(min=1))
@click.option("--out", default=str(FOLDER), show_default=True, help="Folder of the records.")
def main(example: str, seeds: int, out: str) -> None:
    """Record learning curves of a trainer of examples/, such as ppo_single_file."""
    click.echo(record(example, seeds, Path(out)))


if __name__ == "__main__":
    main()
