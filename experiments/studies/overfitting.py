"""``python -m experiments.studies.overfitting``: how far a search overfits its calibration text."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from agents.baselines.base import price_per_byte
from agents.baselines.orders import GSIBaseline
from experiments.comparison.formatting import (
    Table,
    look,
    publish_tables,
    signed,
)
from experiments.comparison.run_folder import RunFolder
from experiments.comparison.statistics import bootstrap_mean, paired_difference
from experiments.config import Config
from experiments.console import say
from experiments.errors import ExperimentError
from experiments.launch import launch
from experiments.studies.evaluation import (
    Search,
    StudyContexts,
    StudyEvaluator,
    captioned_tables,
    gsi_identity,
    reseeded,
)
from experiments.studies.records import StudyRow, search_evaluations
from rap_env.context.base import PruningContext
from rap_env.llm.progress import progress_bar
from rap_env.request import Request

FILE = "overfitting.jsonl"
TEXT, REPORT = "calibration", "report"
_FROZEN = ("model", "repair", "importance.gsi_method", "importance.gsi_removals")

CAPTION = (
    "ΔNLL (nats/token) on the calibration text that masks were searched on and on report text, "
    "mean over requests and draws, with a 95 % interval over windows and draws; gap: report minus "
    "calibration; against the largest: ΔNLL on the report text minus that of the masks searched on "
    "the largest text, paired over windows."
)


class GSIPerByteBaseline(GSIBaseline):
    """Removes blocks in order of the marginal ΔNLL that GSI measured, per freed byte.

    Blocks that GSI did not remove count with their last measured marginal ΔNLL.
    """

    name = "gsi_per_byte"

    def __init__(self, context: PruningContext, seed: int = 0) -> None:
        super().__init__(context, seed)
        self._marginal = context.gsi.marginal_delta_nll

    def _order(self, request: Request) -> Sequence[int]:
        freed = self.memory.freed_bytes(request)
        prices = [price_per_byte(*pair) for pair in zip(self._marginal, freed, strict=True)]
        return [int(index) for index in np.argsort(prices, kind="stable")]


METHODS = {"gsi": GSIBaseline, GSIPerByteBaseline.name: GSIPerByteBaseline}


def overfitting(config: Config, folder: Path) -> Path:
    """Measure an order on calibration texts of several sizes, and evaluate its masks.

    Returns:
        The path of ``overfitting.jsonl``.
    """
    if not config.overfitting.cells:
        raise ExperimentError("overfitting.cells needs an entry.")
    run, started = RunFolder(folder), time.monotonic()
    run.start(config, frozen=_FROZEN)
    rows = _rows(config, folder)
    evaluations = search_evaluations(rows, per_cell=False)
    run.finish(started, rows=len(rows), evaluations=evaluations)
    publish_tables(folder, *captioned_tables("Overfitting", [(CAPTION, gap_table(rows))]))
    say(f"{evaluations:,} evaluations to measure the orders; {len(rows)} rows in {folder / FILE}.")
    return folder / FILE


def _rows(config: Config, folder: Path) -> list[StudyRow]:
    """Return a row for each method, size, draw and cell."""
    settings, contexts = config.overfitting, StudyContexts(config)
    report = {REPORT: contexts.load(config.evaluate.text, "report")}
    draws = {
        (windows, seed): contexts.load(reseeded(config.calibration, seed, windows), "calibration")
        for windows in settings.windows
        for seed in settings.seeds_of(windows)
    }
    evaluator = StudyEvaluator("overfitting", contexts, list(draws.values()), report, folder / FILE)
    rows: list[StudyRow] = []
    bar = progress_bar(config.progress, draws.items(), desc="overfitting", unit="search")
    for (_, seed), corpus in bar:
        context, identity = contexts.on(corpus), gsi_identity(config)
        for method, baseline in METHODS.items():
            search = Search(method, TEXT, seed, context, baseline, identity)
            rows += evaluator.rows(search, settings.parsed_cells)
    return rows


def gap_table(rows: Sequence[StudyRow]) -> Table:
    """Table with one line per method and size: ΔNLL on both texts, their gap, more text."""
    header = ["Method", "Tokens", "Draws", "ΔNLL, calibration", "ΔNLL, report", "Gap",
              "Against the largest"]  # fmt: skip
    lines = []
    for method in dict.fromkeys(row.method for row in rows):
        own = [row for row in rows if row.method == method]
        largest = max(row.tokens for row in own)
        for tokens in sorted({row.tokens for row in own}):
            same = [row for row in own if row.tokens == tokens]
            deltas, best = _windows(same), _windows([r for r in own if r.tokens == largest])
            seen = float(np.mean([row.loss_calibration for row in same]))
            found, more = bootstrap_mean(deltas), paired_difference(deltas, best)
            apart = "-" if tokens == largest else signed(more)
            lines.append(
                [look(method).label, f"{tokens:,}", f"{len(deltas)}", f"{seen:.3f}", str(found),
                 f"{found.mean - seen:+.3f}", apart]
            )  # fmt: skip
    return header, lines


def _windows(rows: Sequence[StudyRow]) -> list[list[float]]:
    """ΔNLL on the report text, mean over cells, (draws, windows)."""
    seeds = dict.fromkeys(row.seed for row in rows)
    return [
        np.mean([row.window_losses for row in rows if row.seed == seed], axis=0).tolist()
        for seed in seeds
    ]


if __name__ == "__main__":
    launch("overfitting", overfitting)
