"""``python -m experiments.export_minari``: episodes of a pinned task as a Minari dataset.

Random actions, the greedy order, the best measured plan that fits and the packaged policy share
the episodes. The dataset is in Minari's folder (MINARI_DATASETS_PATH).
"""

from __future__ import annotations

import click

from experiments.console import fail, say
from experiments.export_minari.episodes import BEHAVIOURS, export
from rap_env.errors import RapError
from rap_env.leaderboard.tasks import pinned_task


@click.command()
@click.option("--task", default="RAPPrune/SmolLM2-Table-v1", show_default=True)
@click.option("--episodes", default=400, show_default=True, type=click.IntRange(min=1))
@click.option("--behaviours", default=",".join(BEHAVIOURS), show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--name", help="Id of the dataset; by default made from the task.")
def main(task: str, episodes: int, behaviours: str, seed: int, name: str | None) -> None:
    """Write episodes of a pinned task as a Minari dataset.

    Random actions, the greedy order, the best measured plan that fits and the packaged policy share
    the episodes. The dataset is in Minari's folder (MINARI_DATASETS_PATH).
    """
    try:
        pinned = pinned_task(task)
        default = f"rap/{task.rpartition('/')[2].rpartition('-')[0].lower()}"
        dataset_id = name or f"{default}-{pinned.environment[-2:]}/mixed-v0"
        written = export(pinned, dataset_id, episodes, behaviours.split(","), seed)
    except RapError as error:
        fail(str(error))
    say(
        f"{dataset_id}: {written.total_episodes:,} episodes, {written.total_steps:,} steps. "
        f"minari.load_dataset({dataset_id!r}) reads it."
    )


if __name__ == "__main__":
    main()
