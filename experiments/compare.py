"""``python -m experiments.compare``: compare any set of run folders, from records only.

Rows of different models, texts or repairs form separate groups and are never averaged together.
Only the comparison is printed to the standard output.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.comparison.loading import Group, Learning, read_groups
from experiments.comparison.summaries import Comparison
from experiments.comparison.tables import (
    COUNTS_CAPTION,
    PART_CAPTIONS,
    PART_TITLES,
    costs_table,
    difference_table,
    tables_markdown,
    terminal_text,
    tight_document,
)
from experiments.comparison.training_runs import TrainingRun
from experiments.config.evaluation import CompareConfig
from experiments.launch import launch_reader
from experiments.study.looks import look, short_label
from experiments.study.records import Cell
from experiments.study.run_names import short_keys
from experiments.study.tables import (
    Table,
    TitledTable,
    markdown,
    plain,
    seconds,
    text_words,
    wrapped,
)


def compare(config: CompareConfig) -> str:
    """Return the comparison of all methods in some folders, in the configured format."""
    groups, learning = read_groups(config.folders)
    if config.format == "json":
        rows = [*result_rows(groups, learning), *training_rows(groups, learning)]
        return json.dumps(rows, indent=1, allow_nan=False)
    return (as_text if config.format == "text" else as_markdown)(groups, learning)


def result_rows(groups: list[Group], learning: Sequence[Learning] = ()) -> list[dict[str, Any]]:
    """Return a row for each group, part, method and cell.

    Keys with ``loss`` are ΔNLL in nats per token, on the report text unless stated otherwise.
    Trained methods also have what varies in their sweep, and the mean objective of their runs.
    """
    trained = {(f.name, method): runs for f in learning for method, runs in f.by_method.items()}
    return [
        {
            **_row(group, comparison, method, cell),
            **_sweep_of(trained.get((group.home, method), [])),
        }
        for group in groups
        for comparison in group.parts.values()
        for method in comparison.compared
        for cell in sorted({row.cell for row in comparison.rows if row.method == method})
    ]


def training_rows(groups: list[Group], learning: Sequence[Learning]) -> list[dict[str, Any]]:
    """Return a row for each training run whose method no evaluation has measured."""
    measured = {(group.home, row.method) for group in groups for row in group.rows}
    return [
        {
            "comparison": found.name,
            "model": found.model,
            "repair": found.repair,
            "part": "training",
            "method": run.method,
            "run": run.label,
            "learned": True,
            "seed": run.seed,
            "swept": run.swept,
            "objective": run.objective,
            "objective_on": run.facts.get("objective_on"),
            "finished": "finished" in run.facts,
            "pruned": run.facts.get("pruned", False),
            "timesteps": run.facts.get("timesteps"),
            "evaluations": run.facts.get("evaluations"),
            "training_s": run.facts.get("training_s"),
            "final_loss": final_delta_nll(run),
        }
        for found in learning
        for run in found.runs
        if (found.name, run.method) not in measured
    ]


def _sweep_of(runs: Sequence[TrainingRun]) -> dict[str, Any]:
    if not runs:
        return {}
    return {"swept": settings_of(runs), "objective": mean_objective(runs)}


def _row(group: Group, comparison: Comparison, method: str, cell: Cell) -> dict[str, Any]:
    found, first = comparison.summary(method, [cell]), comparison.at(method, cell)[0]
    depends = group.depends_on
    return {
        "comparison": group.name,
        "model": group.model,
        "repair": group.repair,
        "part": comparison.part,
        "method": method,
        "learned": method in comparison.learned,
        "request": f"{cell[0]}x{cell[1]}",
        "budget_fraction": cell[2],
        "budget_bytes": first.budget_bytes,
        "target_loss": first.target_loss,
        "sparsity": first.sparsity,
        "loss_mean": found.delta_nll.mean,
        "ci_low": found.delta_nll.low,
        "ci_high": found.delta_nll.high,
        "loss_calibration_mean": found.delta_nll_calibration,
        "seeds": found.rows,
        "fits": found.fits_all,
        "kv_aware": found.kv_aware,
        "evaluations": found.evaluations,
        "decision_s": found.decision_s,
        "setup_evaluations": found.setup_evaluations,
        "training_s": found.training_s,
        "report_sha256": depends.get("report_sha256"),
        "calibration_sha256": depends.get("calibration_sha256"),
    }


def settings_of(runs: Sequence[TrainingRun]) -> dict[str, Any]:
    """Return what varies in the sweep of a method's runs, other than the seed."""
    return {key: value for key, value in runs[0].swept.items() if key != "seed"}


def mean_objective(runs: Sequence[TrainingRun]) -> float | None:
    """Return the mean objective of a method's runs, nats per token; None before there is one."""
    known = [run.objective for run in runs if run.objective is not None]
    return float(np.mean(known)) if known else None


LAST_EPISODES = 50
"""Number of last training episodes that the final ΔNLL averages."""

LEARNING_CAPTION = (
    f"Final ΔNLL: mean over the last {LAST_EPISODES} training episodes (sampled actions, "
    "calibration text, nats per token) and seeds, with the lowest and the highest seed. Objective: "
    "mean ΔNLL of the policy's choices on the evaluation's grid, which a search minimises."
)


def as_text(groups: Sequence[Group], learning: Sequence[Learning]) -> str:
    """Format all groups for the terminal, then the results of training runs."""
    parts = [_group_text(group) for group in groups]
    for found in learning:
        parts.append(
            f"== {_title(found)}: training ==\n\n{plain(learning_table(found))}\n\n"
            f"{wrapped(LEARNING_CAPTION)}"
        )
        if swept := swept_table(found):
            parts.append(f"== {_title(found)}: what varies ==\n\n{plain(swept)}")
    return "\n\n\n".join(parts)


def as_markdown(groups: Sequence[Group], learning: Sequence[Learning]) -> str:
    """Format all tables as Markdown."""
    parts = []
    for group in groups:
        first, *others = group.parts.values()
        parts.append(tables_markdown(first, _title(group)))
        parts += [tables_markdown(other, _title(group)) for other in others if first.part != "grid"]
    for found in learning:
        parts.append(
            f"# {_title(found)}: training\n\n{markdown(learning_table(found))}\n"
            f"{LEARNING_CAPTION}\n"
        )
        if swept := swept_table(found):
            parts.append(f"# {_title(found)}: what varies\n\n{markdown(swept)}")
    return "\n".join(parts).rstrip()


def learning_table(found: Learning) -> Table:
    """Return objective, final ΔNLL and cost of the training runs of each method, over seeds."""
    header = ["Trained", "Seeds", "Steps", "Evaluations", "Training", "Final ΔNLL", "Objective"]
    rows = []
    for method, runs in by_objective(found):
        losses = [loss for run in runs if (loss := final_delta_nll(run)) is not None]
        shown = f"{np.mean(losses):.3f} [{min(losses):.3f}, {max(losses):.3f}]" if losses else "-"
        rows.append(
            [
                short_label(method), str(len(runs)), _mean_fact(runs, "timesteps"),
                _mean_fact(runs, "evaluations"), _training_time(runs), shown, _objective(runs),
            ]
        )  # fmt: skip
    return header, rows


def swept_table(found: Learning) -> Table | None:
    """Return the objective and the whole values of what varies between methods, best first.

    Returns:
        None if nothing but agent and seed varies.
    """
    methods = by_objective(found)
    keys = dict.fromkeys(key for _, runs in methods for key in settings_of(runs))
    keys.pop("agent", None)  # the runs are named by it
    if not keys:
        return None
    short = short_keys(keys)
    rows = [
        [
            *[str(settings_of(runs).get(key, "-")) for key in keys],
            _agent_of(runs[0]), _objective(runs),
        ]
        for _, runs in methods
    ]  # fmt: skip
    return [*[short[key] for key in keys], "Trained", "Objective"], rows


def by_objective(found: Learning) -> list[tuple[str, list[TrainingRun]]]:
    """Return methods and their runs; of a sweep, those with the best objective first."""
    methods = list(found.by_method.items())
    if not any(settings_of(runs) for _, runs in methods):
        return methods

    def objective(method: tuple[str, list[TrainingRun]]) -> float:
        known = mean_objective(method[1])
        return math.inf if known is None else known

    return sorted(methods, key=objective)


def _agent_of(run: TrainingRun) -> str:
    agent = (run.settings() or {}).get("agent", {})
    return short_label(agent.get("label") or agent.get("name") or run.method)


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


def _group_text(group: Group) -> str:
    depends = group.depends_on
    parts = [
        f"== {_title(group)} ==",
        wrapped(
            f"Report text: {text_words(depends.get('report_text', {}))}. Calibration text: "
            f"{text_words(depends.get('calibration', {}))}."
        ),
    ]
    for part, comparison in group.parts.items():
        if part in PART_TITLES:
            parts += [f"-- {PART_TITLES[part]} --", wrapped(PART_CAPTIONS[part])]
        parts += _comparison_text(comparison)
    return "\n\n".join(parts)


def _comparison_text(comparison: Comparison) -> list[str]:
    if not comparison.summaries:
        return ["No pair of request and budget has results of all methods, so nothing is compared."]
    parts = [terminal_text(comparison), plain(setup_table(comparison))]
    parts += [_titled(part) for part in tight_document(comparison)]
    learned = [s.method for s in comparison.summaries if s.method in comparison.learned]
    for method in learned:
        title = f"ΔNLL of {look(method).label} minus each other method (nats per token, paired):"
        parts.append(f"{title}\n\n{plain(difference_table(comparison, method, short=True))}")
    if learned:
        parts.append(wrapped(COUNTS_CAPTION))
    return parts


def _titled(part: TitledTable) -> str:
    caption = f"\n\n{wrapped(part.caption)}" if part.caption else ""
    return f"{part.title}:\n\n{plain(part.table)}{caption}"


def setup_table(comparison: Comparison) -> Table:
    """Return the cost of each method before any request."""
    costs = zip(comparison.summaries, costs_table(comparison)[1], strict=True)
    rows = [[short_label(summary.method), *row[3:5]] for summary, row in costs]
    return ["Cost once", "Evaluations", "Training"], rows


def _title(found: Group | Learning) -> str:
    repair = "no repair" if found.repair == "none" else f"repair {found.repair}"
    return f"{found.name}: {found.model}, {repair}"


def _mean_fact(runs: Sequence[TrainingRun], key: str) -> str:
    known = [run.facts[key] for run in runs if run.facts.get(key) is not None]
    return f"{np.mean(known):,.0f}" if known else "-"


def _training_time(runs: Sequence[TrainingRun]) -> str:
    """Return mean training time of the finished runs, and the number of unfinished ones."""
    known = [run.facts["training_s"] for run in runs if "training_s" in run.facts]
    open_runs = sum("finished" not in run.facts for run in runs)
    mean = seconds(float(np.mean(known))) if known else "-"
    return f"{mean} ({open_runs} unfinished)" if open_runs else mean


def main(config: CompareConfig) -> None:
    """Print the comparison to the standard output."""
    sys.stdout.write(f"{compare(config)}\n")


if __name__ == "__main__":
    launch_reader("compare", CompareConfig, main)
