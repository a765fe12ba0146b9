"""The figure of learning curves: mean ΔNLL over steps, with the range over seeds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from experiments.learning_curves.records import CurvePoint, read_points
from experiments.study.figures import PNG_DPI, panels, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRAINERS = {
    "ppo_single_file": ("PPO in one file", "#C8324B", "online"),
    "sb3_maskable_ppo": ("stable-baselines3", "#2F6DB5", "online"),
    "torchrl_ppo": ("TorchRL", "#E0812F", "online"),
    "rllib_ppo": ("RLlib", "#159A74", "online"),
    "offline_cloning": ("behaviour cloning", "#8E4FA8", "offline"),
    "offline_cql": ("discrete CQL (d3rlpy)", "#6B7178", "offline"),
}
"""Label, colour and panel of each trainer that is shown."""

_STEPS = {"online": "steps of the environment", "offline": "actions of the dataset learned from"}

Curves = Mapping[int, list[CurvePoint]]
"""The evaluations of one trainer, by seed."""


def read_curves(folder: Path) -> dict[str, Curves]:
    """Read the records in a folder, by trainer; those of other names are left out."""
    paths = {name: folder / f"{name}.jsonl" for name in TRAINERS}
    return {name: read_points(path) for name, path in paths.items() if path.is_file()}


def save_figure(found: Mapping[str, Curves], path: Path) -> None:
    """Draw the curves of all trainers into a PNG file."""
    with style():
        learning_curves(found).savefig(path, dpi=PNG_DPI)


def learning_curves(found: Mapping[str, Curves]) -> Figure:
    """Mean over seeds as a line, and the range over seeds as a band."""
    with style():
        figure, axes = panels(1, len(_STEPS), narrow=False, height=3.2, sharey=True)
        for axis, (panel, what) in zip(axes, _STEPS.items(), strict=True):
            for name, curves in found.items():
                if TRAINERS[name][2] == panel:
                    _draw(axis, name, curves)
            axis.set_xlabel(f"{what} (log scale)")
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.set_title(panel)
            if axis.lines:
                axis.legend()
        axes[0].set_ylabel("mean ΔNLL (nats/token, log scale)")
    return figure


def _draw(axis: Axes, name: str, curves: Curves) -> None:
    """One trainer; its evaluations are at the same steps with every seed."""
    label, colour, _ = TRAINERS[name]
    steps = [point.steps for point in next(iter(curves.values()))]
    values = np.array([[point.delta_nll for point in points] for points in curves.values()])
    axis.plot(steps, values.mean(axis=0), color=colour, label=label)
    axis.fill_between(
        steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.12, linewidth=0
    )
