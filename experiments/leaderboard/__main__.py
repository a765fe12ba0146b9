"""``python -m experiments.leaderboard``: check entries of the leaderboard, or publish our own.

``check FILE`` replays the plans of an entry on the real model and on held-out text, and refuses
numbers that do not reproduce. ``judge TASK FOLDER`` evaluates the policies of a training sweep.
``publish`` makes the pinned tasks and the entries of our methods from the records in ``results/``.
"""

from __future__ import annotations

from pathlib import Path

import click

from experiments.console import fail, say
from experiments.leaderboard.checking import check_file
from experiments.leaderboard.judging import judge_runs
from experiments.leaderboard.publishing import TASKS_FILE, publish
from rap_env.errors import RapError
from rap_env.leaderboard.tasks import SPLITS


@click.group()
def main() -> None:
    """Check entries of the leaderboard, evaluate trained policies, or publish our own."""


@main.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--text", type=click.Path(exists=True), help="The file of the held-out text.")
@click.option("--text-field", default="page", show_default=True)
@click.option("--every", default=1, show_default=True, help="Check each n-th request only.")
@click.option("--threads", default=1, show_default=True)
def check(file: Path, text: str | None, text_field: str, every: int, threads: int) -> None:
    """Replay the plans of FILE on the real model, and refuse what does not reproduce."""
    try:
        wrong = check_file(file, text, text_field, every, threads)
    except RapError as error:
        fail(str(error))
    for line in wrong:
        say(line)
    if wrong:
        fail(f"{file} does not reproduce: {len(wrong)} differences.")
    say(f"{file} reproduces.")


@main.command()
@click.argument("task")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--split", type=click.Choice(SPLITS), default="test", show_default=True)
def judge(task: str, folder: Path, split: str) -> None:
    """Evaluate the training runs of a comparison's FOLDER on the pinned TASK.

    The rows, in FOLDER/evaluate, are those that experiments.compare reads.
    """
    try:
        for run, result in judge_runs(task, folder, split):
            predicted = sum(cell.predicted for cell in result.cells)
            say(
                f"{run.label}: ΔNLL {result.mean_delta_nll:.4f} nats per token "
                f"({predicted} of {len(result.cells)} predicted)"
            )
    except RapError as error:
        fail(str(error))


@main.command("publish")
@click.option("--results", default="results", show_default=True, type=click.Path(path_type=Path))
def publish_entries(results: Path) -> None:
    """Make the pinned tasks and our entries from the records."""
    entries = publish(results)
    say(f"{TASKS_FILE} and {entries} entries are written.")


if __name__ == "__main__":
    main()
