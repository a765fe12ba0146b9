"""``python -m experiments.studies.texts``: how costs of levels and plans depend on the text.

Each kind of text is drawn with several seeds. The knapsack chooses plans from the one-shot
costs on each draw, and from their mean over kinds; all plans are measured on report text of
each kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from experiments.config import Config
from experiments.config.common import parse_pinned
from experiments.contexts import load_text, reject_table
from experiments.launch import launch
from experiments.study.console import ExperimentError
from experiments.study.harness import Job, Published, Study, measured, untitled
from experiments.study.json_records import Record
from experiments.study.statistics import Estimate, bootstrap_mean, relative_ratio
from experiments.study.table_format import Table, TitledTable, relative_words
from rap_env.artifacts import digest
from rap_env.context.opening import open_store
from rap_env.importance.level_costs import LevelCosts
from rap_env.importance.level_scan import scan_levels
from rap_env.importance.text_kinds import mean_costs
from rap_env.ladder.items import Ladder
from rap_env.ladder.ladder_bytes import LadderBytes
from rap_env.memory import MemoryModel
from rap_env.models.files.loading import load_llm
from rap_env.plan import EMBEDDINGS, Plan
from rap_env.policies.knapsack import KnapsackPolicy
from rap_env.request import Request
from rap_env.scoring.corpus import ensure_disjoint
from rap_env.scoring.scorer import PlanScorer
from rap_env.scoring.store import with_levels

ALL = "all"
"""Plans from the mean of the costs over all kinds."""
OTHERS = "the other kinds"
"""Plans from the costs of each other kind."""

AGREEMENT = (
    "Kendall's tau of the one-shot costs of items on two draws: mean, minimum and maximum over "
    "pairs of draws with different windows. Within a kind, only the seed differs."
)
MATRIX = (
    "ΔNLL (nats/token) of the knapsack's plans by the kind of text that their costs were measured "
    "on (rows) and the kind of report text (columns): mean over requests and draws, with a 95 % "
    f"interval over windows and draws. {ALL}: from the mean of the costs over all kinds, which saw "
    "as many times more text as there are kinds."
)

Draw = tuple[str, int]
"""A calibration text: a kind (`ALL` for all of them) and a seed."""


@dataclass(frozen=True)
class CostRow(Record):
    """One-shot costs of all items on one draw; `costs` has the fields of `LevelCosts`."""

    file = "costs.jsonl"
    identity = ("kind", "seed")

    kind: str
    seed: int
    costs: dict[str, Any]


@dataclass(frozen=True)
class PlanRow(Record):
    """The knapsack's plan for one cell from the costs on one draw, measured on one text.

    Attributes:
        chosen_on: Kind of the draw.
        seed: Its seed.
        cell: The request and its budget in bytes, as in ``texts.cells``.
        judged_on: Kind of the report text.
        window_delta_nll: ΔNLL of each window of the text, nats per token, (windows,).
    """

    file = "plans.jsonl"
    identity = ("chosen_on", "seed", "cell", "judged_on")

    chosen_on: str
    seed: int
    cell: str
    judged_on: str
    window_delta_nll: list[float]


def text_jobs(config: Config, folder: Path) -> Iterator[Job[Any]]:
    """Measure the costs on every draw, then yield them and their plans.

    Raises:
        ExperimentError: There are fewer than two kinds of text, or no cell.
        InfeasibleBudgetError: A budget is below what the lowest levels need.
        CorpusError: A text is too short, or a report text overlaps with a calibration text.
    """
    settings, model = config.texts, config.model
    if len(settings.kinds) < 2 or not settings.cells:
        raise ExperimentError("texts needs two kinds and a cell; give experiment=texts.")
    reject_table(config)
    llm = load_llm(model.name, device=model.device, dtype=model.dtype, weights=model.weights)
    memory, ladder = MemoryModel(llm), Ladder.of(llm.facts, **config.env.ladder)
    requests = {}
    for cell in settings.cells:
        pinned = parse_pinned(cell)
        requests[cell] = Request(*pinned.shape, pinned.budget_bytes)
        LadderBytes(memory, ladder).check_feasible(requests[cell])

    def scorer_of(kind: str, role: str, **drawn: Any) -> PlanScorer:
        text = replace(settings.kinds[kind], window_tokens=settings.window_tokens, **drawn)
        return PlanScorer(llm, load_text(text, role, llm, progress=config.progress), store)

    def depends_on(scorer: PlanScorer, **more: str) -> dict[str, Any]:
        return {"scores": digest(with_levels(scorer.context)), "ladder": ladder.spec, **more}

    def measure_costs(draw: Draw) -> CostRow:
        together = ladder.together
        costs = scan_levels(draws[draw], ladder.cache_levels, together=together, progress=False)
        draws[draw].release()
        return CostRow(*draw, asdict(costs))

    def measure_plan(plan: Plan, chosen_on: str, seed: int, cell: str, kind: str) -> PlanRow:
        delta_nll = reports[kind].window_nll(plan) - reports[kind].window_nll(Plan())
        return PlanRow(chosen_on, seed, cell, kind, delta_nll.tolist())

    store = open_store(config.store)
    draws = {
        (kind, seed): scorer_of(kind, "calibration", windows=settings.windows, seed=seed)
        for kind in settings.kinds
        for seed in settings.seeds
    }
    windows = settings.report_windows
    reports = {kind: scorer_of(kind, "report", windows=windows) for kind in settings.kinds}
    for report in reports.values():
        for scorer in draws.values():
            ensure_disjoint(scorer.corpus, report.corpus)
    cost_jobs = [
        Job(CostRow, draw, depends_on(scorer), partial(measure_costs, draw))
        for draw, scorer in draws.items()
    ]
    yield from cost_jobs
    rows = measured(cost_jobs, folder, "costs", config.progress)
    costs = {(row.kind, row.seed): LevelCosts(**row.costs) for row in rows}
    for seed in settings.seeds:
        costs[ALL, seed] = mean_costs([costs[kind, seed] for kind in settings.kinds])
    levels = {item.name: item.levels for item in ladder.items}
    for kind, report in reports.items():
        for draw, own in costs.items():
            policy = KnapsackPolicy(memory, own, levels=levels)
            made_of = depends_on(report, costs=digest([own.one_shot, own.errors, own.joint]))
            for cell, request in requests.items():
                plan, identity = policy.choose(request), (*draw, cell, kind)
                make = partial(measure_plan, plan, *identity)
                yield Job(PlanRow, identity, made_of, make, scorer=report, plans=[Plan(), plan])


def losses_of(rows: Sequence[Record]) -> tuple[list[str], npt.NDArray[np.float64]]:
    """The kinds of text, K of them, and ΔNLL of each plan on each kind, nats per token.

    Returns:
        The kinds; ΔNLL by what plans were chosen on (each kind, then `ALL`), kind of report
        text, cell, seed and window, (K + 1, K, cells, seeds, windows).
    """
    plans = {
        (row.chosen_on, row.judged_on, row.cell, row.seed): row.window_delta_nll
        for row in rows
        if isinstance(row, PlanRow)
    }
    _, kinds, cells, seeds = (list(dict.fromkeys(part)) for part in zip(*plans, strict=True))
    windows = [plans[key] for key in product([*kinds, ALL], kinds, cells, seeds)]
    return kinds, np.reshape(windows, (len(kinds) + 1, len(kinds), len(cells), len(seeds), -1))


def gap(losses: npt.NDArray[np.float64], rival: str) -> Estimate | None:
    """ΔNLL of the plans of `ALL` or `OTHERS` divided by that of the own kind's, minus 1.

    The geometric mean over kinds and cells; None where `paired_ratio` has none. Kinds have
    equally many windows, drawn independently, so that they may be resampled jointly.

    Args:
        losses: As `losses_of` returns it.
        rival: `ALL` or `OTHERS`.
    """
    _, kinds, cells, *_ = losses.shape
    firsts, seconds = [], []
    for kind, cell in product(range(kinds), range(cells)):
        rivals = [kinds] if rival == ALL else [other for other in range(kinds) if other != kind]
        firsts.append(np.concatenate(losses[rivals, kind, cell]))
        seconds.append(losses[kind, kind, cell])
    return relative_ratio(firsts, seconds)


def text_words(rows: Sequence[Record]) -> str:
    """What a policy would gain that sees the kind of text."""
    _, losses = losses_of(rows)
    return (
        "Relative to plans from costs on the text's own kind, plans from costs on all kinds have a "
        f"ΔNLL of {relative_words(gap(losses, ALL))}, and those from costs on one of {OTHERS} of "
        f"{relative_words(gap(losses, OTHERS))} (geometric mean over kinds and requests, with a "
        "95 % interval over windows and draws)."
    )


def text_tables(rows: Sequence[Record]) -> list[TitledTable]:
    """Agreement of costs, and ΔNLL by the texts that plans were chosen on and judged on."""
    kinds, losses = losses_of(rows)
    matrix = [
        [name, *(str(bootstrap_mean(part.mean(axis=0))) for part in parts), f"{parts.mean():.3f}"]
        for name, parts in zip([*kinds, ALL], losses, strict=True)
    ]
    return [
        TitledTable(agreement_table(rows), "Agreement of costs", AGREEMENT),
        TitledTable((["Chosen on", *kinds, "mean"], matrix), "Plans by kind of text", MATRIX),
    ]


def agreement_table(rows: Sequence[Record]) -> Table:
    """Kendall's tau of the costs of two draws, by kind of item and level."""
    # Two seeds may draw the same windows, which agree by themselves.
    draws = {
        (row.kind, row.costs["provenance"]["text"]["sha256"]): by_level(row)
        for row in rows
        if isinstance(row, CostRow)
    }
    lines = []
    for level in (name for name, costs in next(iter(draws.values())).items() if len(costs) > 1):
        taus: dict[bool, list[float]] = {True: [], False: []}
        for first, second in combinations(draws, 2):
            tau = kendall_tau(draws[first][level], draws[second][level])
            taus[first[0] == second[0]].append(tau)
        shown = (
            f"{np.mean(values):.2f} [{min(values):.2f}, {max(values):.2f}]" if values else "-"
            for values in taus.values()
        )
        lines.append([level, *shown])
    return ["Items and level", "Within a kind", "Between kinds"], lines


def by_level(row: CostRow) -> dict[str, list[float]]:
    """Costs of the ladder's levels by kind of item and level, and all of them.

    Levels that caches take together are left out: their costs are shares of one measurement.
    """
    ladder = row.depends_on["ladder"]
    levels: dict[str, list[float]] = {"all": []}
    for item, costs in row.costs["one_shot"].items():
        kind = item.partition(".")[2] or item
        group = {"cache": "caches", EMBEDDINGS: EMBEDDINGS}.get(kind, "weights")
        for level in ladder["levels"][group]:
            if level in costs and not (kind == "cache" and level in ladder["together"]):
                levels["all"].append(costs[level])
                levels.setdefault(f"{kind} {level}", []).append(costs[level])
    return levels


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float:
    """Kendall's rank correlation tau-b of two lists, from -1 to 1; 0 if one has equal values only.

    Source: Kendall (1945), The treatment of ties in ranking problems.
    """
    rows, columns = np.triu_indices(len(first), 1)
    signs, others = (np.sign(v[rows] - v[columns]) for v in map(np.asarray, (first, second)))
    untied = float(np.abs(signs).sum() * np.abs(others).sum())
    return float(signs @ others) / float(np.sqrt(untied)) if untied else 0.0


STUDY = Study(
    "texts",
    "Plans and the calibration text",
    [CostRow, PlanRow],
    text_jobs,
    text_tables,
    words=text_words,
    frozen=("model", "env.levels", "env.together", "texts.kinds"),
    published=[Published("texts", "texts", untitled)],
)

if __name__ == "__main__":
    launch(STUDY.name, STUDY.run)
