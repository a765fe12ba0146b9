"""``python -m experiments.compare``: compare any set of run folders, from records only.

Rows of different models, texts or repairs form separate groups and are never averaged together.
Only the comparison is printed to the standard output.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from experiments.comparison.loading import Group, Learning, read_groups
from experiments.comparison.tables import tables_markdown
from experiments.comparison.training_runs import TrainingRun
from experiments.config.evaluation import CompareConfig
from experiments.launch import launch_reader
from experiments.study.looks import short_label
from experiments.study.run_names import short_keys
from experiments.study.tables import (
    Table,
    columns_table,
    markdown,
    rendered,
    seconds,
    text_words,
)


def compare(config: CompareConfig) -> str:
    """Return the comparison of all methods in some folders, in the configured format."""
    groups, learning = read_groups(config.folders)
    if config.format == "text":
        return rendered(as_markdown(groups, learning, captions=True))
    return as_markdown(groups, learning)


def settings_of(runs: Sequence[TrainingRun]) -> dict[str, Any]:
    """Return what varies in the sweep of a method's runs, other than the seed."""
    return {key: value for key, value in runs[0].swept.items() if key != "seed"}


def mean_objective(runs: Sequence[TrainingRun]) -> float | None:
    """Return the mean objective of a method's runs, nats per token; None before there is one."""
    return _mean(run.objective for run in runs)


def _mean(values: Iterable[float | None]) -> float | None:
    measured = [value for value in values if value is not None]
    return float(np.mean(measured)) if measured else None


LAST_EPISODES = 50
"""Number of last training episodes that the final ΔNLL averages."""

LEARNING_CAPTION = (
    f"Final ΔNLL: mean over the last {LAST_EPISODES} training episodes (sampled actions, "
    "calibration text, nats per token) and seeds, with the lowest and the highest seed. Objective: "
    "mean ΔNLL of the policy's choices on the evaluation's grid, which a search minimises."
)


def as_markdown(
    groups: Sequence[Group], learning: Sequence[Learning], *, captions: bool = False
) -> str:
    """Format the tables of all groups as Markdown, then the results of training runs.

    Args:
        groups: Result rows.
        learning: Training runs.
        captions: Whether to add the texts of each group, and what the numbers of its tables mean.
    """
    parts = []
    for group in groups:
        first, *others = group.parts.values()
        shown = [first, *(others if first.part != "grid" else [])]
        for comparison in shown:
            parts.append(tables_markdown(comparison, _title(group), captions=captions))
        parts += [f"{_texts(group)}\n"] if captions else []
    for part in learning:
        title, table = _title(part), markdown(learning_table(part))
        parts.append(f"# {title}: training\n\n{table}\n{LEARNING_CAPTION}\n")
        if swept := swept_table(part):
            parts.append(f"# {title}: what varies\n\n{markdown(swept)}")
    return "\n".join(parts).rstrip()


def _texts(group: Group) -> str:
    depends = group.depends_on
    return (
        f"Report text: {text_words(depends.get('report_text', {}))}. Calibration text: "
        f"{text_words(depends.get('calibration', {}))}."
    )


def learning_table(part: Learning) -> Table:
    """Return objective, final ΔNLL and cost of the training runs of each method, over seeds."""

    def count(runs: Sequence[TrainingRun], key: str) -> str:
        mean = _mean(run.facts.get(key) for run in runs)
        return "-" if mean is None else f"{mean:,.0f}"

    def training(runs: Sequence[TrainingRun]) -> str:
        mean = _mean(run.facts.get("training_s") for run in runs)
        unfinished = sum("finished" not in run.facts for run in runs)
        shown = "-" if mean is None else seconds(mean)
        return f"{shown} ({unfinished} unfinished)" if unfinished else shown

    def final(runs: Sequence[TrainingRun]) -> str:
        losses = [loss for run in runs if (loss := final_delta_nll(run)) is not None]
        return f"{np.mean(losses):.3f} [{min(losses):.3f}, {max(losses):.3f}]" if losses else "-"

    columns: dict[str, Callable[[tuple[str, list[TrainingRun]]], str]] = {
        "Trained": lambda method: short_label(method[0]),
        "Seeds": lambda method: str(len(method[1])),
        "Steps": lambda method: count(method[1], "timesteps"),
        "Evaluations": lambda method: count(method[1], "evaluations"),
        "Training": lambda method: training(method[1]),
        "Final ΔNLL": lambda method: final(method[1]),
        "Objective": lambda method: _objective(method[1]),
    }
    return columns_table(by_objective(part), columns)


def swept_table(part: Learning) -> Table | None:
    """Return the objective and the whole values of what varies between methods, best first.

    Returns:
        None if nothing but agent and seed varies.
    """
    methods = by_objective(part)
    keys = dict.fromkeys(key for _, runs in methods for key in settings_of(runs))
    keys.pop("agent", None)  # the runs are named by it
    if not keys:
        return None
    short, rows = short_keys(keys), []
    for _, runs in methods:
        agent = (runs[0].settings() or {}).get("agent", {})
        label = short_label(agent.get("label") or agent.get("name") or runs[0].method)
        values = [str(settings_of(runs).get(key, "-")) for key in keys]
        rows.append([*values, label, _objective(runs)])
    return [*[short[key] for key in keys], "Trained", "Objective"], rows


def by_objective(part: Learning) -> list[tuple[str, list[TrainingRun]]]:
    """Return methods and their runs; of a sweep, those with the best objective first."""
    methods = list(part.by_method.items())
    if not any(settings_of(runs) for _, runs in methods):
        return methods
    objectives = {method: mean_objective(runs) for method, runs in methods}
    return sorted(methods, key=lambda m: (objectives[m[0]] is None, objectives[m[0]]))


def _objective(runs: Sequence[TrainingRun]) -> str:
    mean = mean_objective(runs)
    return "-" if mean is None else f"{mean:.4f}"


def final_delta_nll(run: TrainingRun) -> float | None:
    """Return the mean ΔNLL of a training's last episodes, nats per token; None if not logged."""
    _, losses = run.series("episode/loss")
    if losses:
        return float(np.mean(losses[-LAST_EPISODES:]))
    recent = run.facts.get("recent_loss")
    return None if recent is None else float(recent)


def _title(shown: Group | Learning) -> str:
    repair = "no repair" if shown.repair == "none" else f"repair {shown.repair}"
    return f"{shown.name}: {shown.model}, {repair}"


def main(config: CompareConfig) -> None:
    """Print the comparison to the standard output."""
    sys.stdout.write(f"{compare(config)}\n")


if __name__ == "__main__":
    launch_reader("compare", CompareConfig, main)
