"""Pictures: what a decision costs, an episode, and figures of studies."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from PIL import Image
from record_tables import STUDIES, Source, method_rows, unseen
from task_tables import MASK, README_TASKS

from experiments.comparison.summaries import Comparison, compare_pair
from experiments.studies.equal_process import rows as equal_process
from experiments.studies.replay import conversations
from experiments.study.plotting import FAINT, INK, Panel, look, panel_figure, save_gif, save_png
from experiments.study.table_format import seconds
from experiments.unseen import generalisation
from rap_env.ladder.features import ITEM_FEATURES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

IMAGES = Path(__file__).resolve().parent / "images"

SEARCHES = (
    Source("tight_greedy", "greedy_per_byte"),
    Source("tight_searches", "evolutionary"),
    Source("tight_searches", "beam"),
)
"""Searches for one request of `tight`."""

_OFFSETS = {  # of labels that would overlap others
    "rap": (9, 5),
    "frontier": (9, -1),
    "score_model": (9, -13),
    "greedy_per_byte": (-120, 11),
    "evolutionary": (9, 6),
    "beam": (15, -3),
}


def decision_cost() -> Figure:
    """Draw ΔNLL relative to the policy's against the runs of the model for one request.

    The searches were run at a few of the requests and budgets only, where they are compared.
    """
    rows = method_rows("tight") + [row for search in SEARCHES for row in search.rows]
    compared, most = Comparison(rows), len({row.cell for row in rows})
    style: dict[str, Any] = {"markersize": 7, "capsize": 3, "elinewidth": 1}

    def draw(axis: Axes) -> None:
        for method in compared.methods:
            own = [row for row in compared.rows if row.method == method]
            cells, shown = sorted({row.cell for row in own}), look(method)
            pair = compare_pair(compared, method, "rap", cells)
            change = pair.relative if pair else None
            if change is None and method != "rap":
                continue
            mean, low, high = (change.mean, change.low, change.high) if change else (0, 0, 0)
            runs, few = [row.evaluations for row in own], len(cells) < most
            x, y = float(np.mean(runs)), 1 + mean
            yerr, xerr = [[mean - low], [high - mean]], [[x - min(runs)], [max(runs) - x]]
            look_of = {"fmt": shown.marker, "color": shown.colour, **style}
            axis.errorbar(x, y, yerr=yerr, xerr=xerr if few else None, **look_of)
            text = f"{shown.label}, {seconds(float(np.median([row.decision_s for row in own])))}"
            text += f" ({len(cells)} requests)" if few else ""
            words = {"xytext": _OFFSETS.get(method, (9, -3)), "textcoords": "offset points"}
            axis.annotate(text, (x, y), **words, fontsize=8, color=INK)
        axis.axhline(1, color=FAINT, linewidth=0.8, linestyle=":")
        axis.set_xscale("symlog", linthresh=1)
        axis.set_xticks([0, 1, 10, 100, 1000], ["0", "1", "10", "100", "1,000"])
        axis.set_xlim(-0.15, 9000)

    panel = Panel(draw, x="runs of the model for one request", y="mean ΔNLL / the policy's")
    return panel_figure([panel], height=3.3, legend=0)


@cache
def episode() -> tuple[list[Image.Image], float]:
    """Pictures of an episode in the greedy order, one after each third action, and its ΔNLL."""
    env = gym.make(README_TASKS[1], render_mode="rgb_array")
    request = {"batch_size": 8, "seq_len_tokens": 2048, "budget_fraction": 0.25}
    observation, _ = env.reset(seed=0, options={"request": request})
    images, over = [env.render()], False
    while not over:
        order = observation["ladder"][:, ITEM_FEATURES.index("order_place")]
        action = np.where(observation[MASK], order, np.inf).argmin()
        observation, _, *ends, info = env.step(action)
        over = any(ends)
        images.append(env.render())
    shown = [Image.fromarray(image).resize((720, 480)) for image in [*images[::3], images[-1]]]
    return shown, float(info["delta_nll"])


def save_pictures() -> None:
    """Write all pictures."""
    kept, speed = STUDIES["conversations"].rows, STUDIES["equal_process"].rows
    for name, figure in {
        "decision_cost": decision_cost(),
        "kept_bytes": conversations.memory_figure(kept),
        "equal_process": equal_process.process_figure(speed),
        "unseen_models": generalisation(unseen()),
    }.items():
        save_png(figure, IMAGES / f"{name}.png")
    save_gif(episode()[0], IMAGES / "episode.gif")
