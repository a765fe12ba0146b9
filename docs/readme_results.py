"""The table and the figure of README.md, with every number taken from the committed records."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from record_tables import LOW_BITS, OWN_BUDGETS, PLANS, RESULTS, SEARCHES, plan_rows, read

from experiments.comparison.result_rows import ResultRow
from experiments.comparison.summaries import Comparison, Summary, compare_pair
from experiments.study.plotting import FAINT, INK, Panel, look, panel_figure
from experiments.study.statistics import Estimate
from experiments.study.table_format import columns_table, markdown, percent, seconds
from rap_env.errors import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POLICY = "rap"
METHODS = {
    POLICY: "a trained network",
    "frontier": "the best of the measured plans that fits",
    "score_model": "a local search on predicted losses",
    "uniform": "one level for all, then whole blocks, tuned",
    "knapsack": "adds up costs that were measured one by one",
    "one_shot": "follows one order of costs",
}
"""The methods of the table, with what each does."""


LADDERS = {
    "Four bits": PLANS,
    "Two bits, same budgets": LOW_BITS,
    "Two bits, budgets of their own": OWN_BUDGETS,
}
"""The table's columns: how few bits a weight may have, and at which budgets."""


def readme_results() -> str:
    """The README's result in a sentence, and its table of methods, the least ΔNLL first."""
    by_ladder = {
        title: {
            summary.method: summary
            for summary in Comparison(
                [row for row in plan_rows(name) if row.method in METHODS]
            ).summaries
        }
        for title, name in LADDERS.items()
    }
    four, two, own = ({m: s.delta_nll.mean for m, s in by.items()} for by in by_ladder.values())
    seeds = ", ".join(str(by[POLICY].delta_nll.seeds) for by in by_ladder.values())
    decision_s = {m: summary.decision_s for m, summary in by_ladder["Four bits"].items()}
    columns: dict[str, Callable[[Summary], str]] = {"Method": _name}
    for title, summaries in by_ladder.items():
        columns[title] = partial(_delta_nll, summaries)
    columns["Decision"] = lambda s: seconds(s.decision_s)
    table = columns_table(by_ladder["Four bits"].values(), columns)
    return (
        f"**With weights down to two bits the same budgets cost "
        f"{percent(1 - min(two.values()) / min(four.values()), 0)} less. Where every choice costs "
        f"something,\nthe policy loses {percent(1 - four[POLICY] / four['uniform'], 0)} less than "
        f"uniform settings tuned by hand ({percent(1 - own[POLICY] / own['uniform'], 0)} less down "
        f"to two bits),\nin {1000 * decision_s[POLICY]:.0f} ms and without a run of the model.** "
        f"Mean ΔNLL by the fewest bits of weights (policy: {seeds} seeds):\n\n"
        f"{markdown(table)}"
    )


def _delta_nll(summaries: Mapping[str, Summary], row: Summary) -> str:
    """A method's ΔNLL in another comparison; a dash where it was not measured."""
    summary = summaries.get(row.method)
    if summary is None:
        return "-"
    text = str(summary.delta_nll)
    return f"**{text}**" if row.method == POLICY else text


def table_speeds() -> str:
    """Steps a second on the packaged tables."""
    record = RESULTS / "benchmarks" / "table_steps-cpu.json"
    targets = json.loads(record.read_text(encoding="utf-8"))["targets"]
    ladder, prune = (round(target["reached"], -3) for target in targets)
    return (
        f"On the table, 64 sub-environments of `RAPLadder-v0` make {ladder:,.0f} steps a second on "
        f"one core, those of\n`RAPPrune-v0` {prune:,.0f}, without model or torch."
    )


def _name(summary: Summary) -> str:
    """The method's name and what it does; the policy stands out."""
    name = look(summary.method).label
    shown = f"**{name}**" if summary.method == POLICY else name
    return f"{shown}: {METHODS[summary.method]}"


def relative_to_policy() -> dict[str, tuple[list[ResultRow], Estimate]]:
    """Each method's rows, and its mean ΔNLL divided by the policy's at the same cells.

    The searches were run at a few of the requests and budgets only.
    """
    rows = [row for row in plan_rows(PLANS) if row.method in METHODS]
    for folder, method, comparison in SEARCHES.values():
        if comparison == PLANS:
            rows += [row for row in read(folder) if row.method == method]
    compared, ratios = Comparison(rows), {}
    for method in compared.methods:
        own = [row for row in compared.rows if row.method == method]
        pair = compare_pair(compared, method, POLICY, sorted({row.cell for row in own}))
        if pair and (change := pair.relative):
            ratios[method] = own, Estimate(1 + change.mean, 1 + change.low, 1 + change.high)
    return ratios


_OFFSETS = {  # of labels that would overlap others
    POLICY: (9, 5), "frontier": (9, -1), "score_model": (9, -13), "greedy_per_byte": (-120, 7),
    "evolutionary": (9, 6), "beam": (15, -3),
}  # fmt: skip


def decision_cost() -> Figure:
    """Draw ΔNLL relative to the policy's against the runs of the model for one request."""
    ratios = relative_to_policy()
    most = len({row.cell for row in ratios[POLICY][0]})

    def draw(axis: Axes) -> None:
        for method, (rows, ratio) in ratios.items():
            runs, shown = [row.evaluations for row in rows], look(method)
            mean, pairs = float(np.mean(runs)), len({row.cell for row in rows})
            axis.errorbar(
                mean, ratio.mean, yerr=[[ratio.mean - ratio.low], [ratio.high - ratio.mean]],
                xerr=[[mean - min(runs)], [max(runs) - mean]] if pairs < most else None,
                fmt=shown.marker, color=shown.colour, markersize=7, capsize=3, elinewidth=1,
            )  # fmt: skip
            text = f"{shown.label}, {seconds(float(np.median([row.decision_s for row in rows])))}"
            if pairs < most:
                text += f" ({counted(pairs, 'pair')})"
            axis.annotate(
                text, (mean, ratio.mean), xytext=_OFFSETS.get(method, (9, -3)),
                textcoords="offset points", fontsize=8, color=INK,
            )  # fmt: skip
        axis.axhline(1, color=FAINT, linewidth=0.8, linestyle=":")
        axis.set_xscale("symlog", linthresh=1)
        axis.set_xticks([0, 1, 10, 100, 1000], ["0", "1", "10", "100", "1,000"])
        axis.set_xlim(-0.15, 9000)

    panel = Panel(draw, x="runs of the model for one request", y="mean ΔNLL / the policy's")
    return panel_figure([panel], height=3.3, legend=0)
