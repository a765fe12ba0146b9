"""``python -m experiments.studies.level_scan``: costs of levels by gradient and one by one.

Every level of every block and cache is measured alone, and in all of them at once, which is
the reference for costs by gradient (`rap_env.importance.gradient_costs`). It takes hundreds
of evaluations where those take a backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np

from experiments.config import Config
from experiments.contexts import build_context, measured_on
from experiments.launch import launch
from experiments.study.harness import Job, Study
from experiments.study.json_records import Record
from experiments.study.table_format import TitledTable, columns_table
from rap_env.context.opening import require_live
from rap_env.importance.gradient_costs import item_levels, mean_costs, window_costs
from rap_env.importance.level_costs import CACHE_LEVELS, Costs
from rap_env.models.live.partial_forward import PartialForward
from rap_env.plan import EMBEDDINGS, Plan, is_cache
from rap_env.scoring.held_out import spearman

CAPTION = (
    "ΔNLL (nats/token) of one level, on the text that gradients are of: the sum over items that "
    "are lowered alone, the sum of the costs by gradient, and all items lowered at once; and "
    "Spearman's rank correlation of the items' costs measured alone and by gradient."
)


@dataclass(frozen=True)
class LevelScanRow(Record):
    """What a level of one item costs alone, or of all items of a kind at once.

    Attributes:
        item: Name of the item; ``"blocks"`` or ``"caches"`` for all of them.
        level: The level.
        delta_nll: Measured ΔNLL, nats per token.
        by_gradient: Its cost by gradient, or the sum over all items, nats per token.
    """

    file = "level_scan.jsonl"
    identity = ("item", "level")

    item: str
    level: str
    delta_nll: float
    by_gradient: float

    @property
    def kind(self) -> str:
        """Which items it belongs to."""
        return "caches" if is_cache(self.item) or self.item == "caches" else "blocks"


def scan_jobs(config: Config, folder: Path) -> Iterator[Job[LevelScanRow]]:
    """Yield each level of each block and cache, then each level of all of them."""
    context = require_live(build_context(config, profiled=False))
    scorer, windows = context.scorer, context.corpus.tokens
    levels = item_levels(context.llm.facts, CACHE_LEVELS, windows.shape[1])
    del levels[EMBEDDINGS]  # measured in any case

    @cache
    def by_gradient() -> Costs:
        forward = PartialForward(context.llm, widen=True, gradients=True)
        parts = [window_costs(forward, window[None], levels) for window in windows]
        return mean_costs(parts, windows.shape[1])

    def measure(item: str, level: str, plan: Plan) -> LevelScanRow:
        expected = sum(by_gradient()[name][level] for name in plan.levels)
        return LevelScanRow(item, level, scorer.nll(plan) - scorer.dense_nll, expected)

    for identity, plan in scanned_plans(levels).items():
        make = partial(measure, *identity, plan)
        yield Job(LevelScanRow, identity, measured_on(scorer), make)


def scanned_plans(levels: Mapping[str, Sequence[str]]) -> dict[tuple[str, str], Plan]:
    """The plans of the rows, by their identity; not all blocks are removed at once."""
    plans = {(item, n): Plan.of({item: n}) for item, names in levels.items() for n in names}
    together: dict[tuple[str, str], dict[str, str]] = {}
    for item, level in plans:
        kind = "caches" if is_cache(item) else "blocks"
        if level != "removed":
            together.setdefault((kind, level), {})[item] = level
    return plans | {identity: Plan.of(lowered) for identity, lowered in together.items()}


def scan_tables(rows: Sequence[LevelScanRow]) -> list[TitledTable]:
    """Sums and rank correlations by kind of items and level."""
    at_once = {(row.item, row.level): row for row in rows if row.item == row.kind}
    alone: dict[tuple[str, str], list[LevelScanRow]] = {}
    for row in rows:
        if row.item != row.kind:
            alone.setdefault((row.kind, row.level), []).append(row)

    def total(field: str, group: tuple[str, str]) -> str:
        return f"{sum(getattr(row, field) for row in alone[group]):.4f}"

    def together(group: tuple[str, str]) -> str:
        return f"{at_once[group].delta_nll:.4f}" if group in at_once else "-"

    def correlation(group: tuple[str, str]) -> str:
        pairs = np.array([(row.delta_nll, row.by_gradient) for row in alone[group]])
        rank = spearman(*pairs.T)
        return "-" if rank is None else f"{rank:.2f}"

    columns: dict[str, Callable[[tuple[str, str]], str]] = {
        "Items and level": " ".join,
        "One by one": partial(total, "delta_nll"),
        "By gradient": partial(total, "by_gradient"),
        "At once": together,
        "Rank correlation": correlation,
    }
    return [TitledTable(columns_table(alone, columns), "Costs by gradient and one by one", CAPTION)]


STUDY = Study(
    "level_scan", "Costs of levels", [LevelScanRow], scan_jobs, scan_tables, frozen=("model",)
)

if __name__ == "__main__":
    launch(STUDY.name, STUDY.run)
