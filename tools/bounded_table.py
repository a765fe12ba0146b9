"""Writes a score table whose unmeasured plans have upper bounds of their whole ΔNLL.

    python -m tools.bounded_table TABLE OUT RECORDS...

The new table has the plans of TABLE (the file of one without bounds), and what the RECORDS
(folders of comparisons) measured on the same text. An ensemble is fitted to all of
them. The multiplier of its standard deviation is the least one at which no family of the
recorded plans loses more than its bounds say, on average. A family has the plans of one
method, and is left out of the fit that predicts it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import click
import numpy as np

from experiments.comparison.result_rows import rows_below
from rap_env.importance.level_costs import LevelCosts
from rap_env.plan import Plan
from rap_env.scoring.predictor_fit import fit_scores, necessary_plans
from rap_env.scoring.score_table import ScoreTable, TableScorer

MEMBERS = 8
Scores = dict[Plan, float]


def recorded(table: ScoreTable, folders: tuple[str, ...]) -> dict[str, Scores]:
    """The NLL of the plans of each method in some records, nats per token."""
    families = defaultdict[str, Scores](dict)
    for row in (row for folder in folders for row in rows_below(Path(folder))):
        if row.depends_on["calibration_sha256"] == table.text["sha256"] and row.plan:
            families[row.method][row.plan] = table.native_nll + row.calibration_delta_nll
    return families


def bounded(table: ScoreTable, scores: Scores, pessimism: float) -> ScoreTable:
    """The table with other scores, and with an ensemble that is fitted to them."""
    lowered = LevelCosts(**(table.levels or {})).delta_nll
    settings = {"members": MEMBERS, "pessimism": pessimism}
    model, fidelity = fit_scores(scores, table.facts.num_blocks, lowered, **settings)
    return replace(table, scores=scores, predictor=model, fidelity=fidelity)


def multiplier(table: ScoreTable, scores: Scores, family: Scores) -> float:
    """The least pessimism at which a family that is left out is bounded, on average."""
    kept = necessary_plans(table.facts.num_blocks)
    others = {plan: nll for plan, nll in scores.items() if plan in kept or plan not in family}
    left_out = [plan for plan in scores if plan not in others]
    fitted, lowered = bounded(table, others, 0.0), LevelCosts(**(table.levels or {})).delta_nll
    above_it = replace(fitted, predictor=replace(fitted.predictor, pessimism=1.0))
    measured = np.mean([scores[plan] for plan in left_out])
    mean, above = (
        np.mean(TableScorer(one, lowered).nll_many(left_out)) for one in (fitted, above_it)
    )
    return float((measured - mean) / (above - mean))


@click.command(help=__doc__)
@click.argument("source", metavar="TABLE", type=click.Path(exists=True, dir_okay=False))
@click.argument("out", type=click.Path(dir_okay=False))
@click.argument("folders", metavar="RECORDS...", nargs=-1, required=True)
def main(source: str, out: str, folders: tuple[str, ...]) -> None:
    """Fit and write a table."""
    table = ScoreTable.load(source)
    families = recorded(table, folders)
    scores = {plan: nll for plans in families.values() for plan, nll in plans.items()}
    scores |= table.scores
    multipliers = {name: multiplier(table, scores, plans) for name, plans in families.items()}
    print(multipliers)
    bounded(table, scores, max(0.0, *multipliers.values())).save(out)


if __name__ == "__main__":
    main()
