"""``python -m experiments.studies.texts``: how costs of levels and plans depend on the text.

Each kind of text is drawn with several seeds. The knapsack chooses plans from the one-shot costs
on each draw, and from their mean over kinds; all plans are measured on report text of each kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from experiments.config import Config
from experiments.config.common import parse_pinned
from experiments.contexts import build_context, load_text, make_ladder_bytes
from experiments.launch import launch
from experiments.study.experiment_errors import ExperimentError
from experiments.study.harness import Job, Study, measured
from experiments.study.json_records import Record
from experiments.study.pages import Published, untitled
from experiments.study.statistics import Estimate, bootstrap_mean, relative_ratio
from experiments.study.table_format import Table, TitledTable, relative_words
from rap_env.artifacts import digest
from rap_env.context.live import LiveContext
from rap_env.context.opening import require_live
from rap_env.importance.kind_costs import mean_costs
from rap_env.importance.level_costs import LevelCosts
from rap_env.importance.level_scan import scan_levels
from rap_env.plan import EMBEDDINGS, Plan
from rap_env.policies.knapsack import KnapsackPolicy
from rap_env.request import Request
from rap_env.scoring.corpus import ensure_disjoint
from rap_env.scoring.scorer import MaskScorer
from rap_env.scoring.store import with_levels

ALL = "all"
"""Plans from the mean of the costs over all kinds."""
OTHERS = "the other kinds"
"""Plans from the costs of each other kind."""
THRESHOLD = 0.03
"""Relative gap from which it is worth while that a policy sees the kind of text."""

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

Losses = npt.NDArray[np.float64]
"""ΔNLL by draw and window, nats per token, (seeds, windows)."""


class Draw(NamedTuple):
    """A calibration text: a kind (`ALL` for all of them) and a seed."""

    kind: str
    seed: int


@dataclass(frozen=True)
class CostRow(Record):
    """One-shot costs of all items on one draw; `costs` has the fields of `LevelCosts`."""

    file = "costs.jsonl"
    record_name = "A row of costs"
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
    record_name = "A row of a plan"
    identity = ("chosen_on", "seed", "cell", "judged_on")

    chosen_on: str
    seed: int
    cell: str
    judged_on: str
    window_delta_nll: list[float]


def text_jobs(config: Config, folder: Path) -> Iterator[Job[Any]]:
    """Measure the costs on every draw, then yield them and their plans.

    Raises:
        ExperimentError: The settings lack something.
        InfeasibleBudgetError: A budget is below what the lowest levels need.
        CorpusError: A text is too short, or a report text overlaps with a calibration text.
    """
    settings = config.texts
    if not config.env.lowers:
        raise ExperimentError("The study of texts measures levels of items; give env=ladder.")
    if len(settings.kinds) < 2 or ALL in settings.kinds or not settings.cells:
        raise ExperimentError(
            f"texts needs a cell, and two kinds with names other than {ALL!r}; got the kinds "
            f"{list(settings.kinds)} and the cells {settings.cells}."
        )
    study = TextJobs(config)
    cost_jobs = study.cost_jobs()
    rows = measured(cost_jobs, folder, "costs", config.progress)
    yield from cost_jobs
    yield from study.plan_jobs({Draw(r.kind, r.seed): LevelCosts(**r.costs) for r in rows})


class TextJobs:
    """The draws, report texts and jobs of one study."""

    def __init__(self, config: Config) -> None:
        self._progress, self._settings = config.progress, config.texts
        size: dict[str, Any] = {
            "windows": config.texts.windows,
            "window_tokens": config.texts.window_tokens,
        }
        self._contexts: dict[Draw, LiveContext] = {}
        for name, kind in config.texts.kinds.items():
            for seed in config.texts.seeds:
                drawn = replace(config, calibration=replace(kind, seed=seed, **size))
                context = require_live(build_context(drawn, profiled=False))
                self._contexts[Draw(name, seed)] = context
        self._memory = context.memory
        ladder_bytes = make_ladder_bytes(config, context)
        assert ladder_bytes is not None
        self._ladder, self._requests = ladder_bytes.ladder, {}
        for cell in self._settings.cells:
            pinned = parse_pinned(cell)
            self._requests[cell] = Request(*pinned.shape, pinned.budget_bytes)
            ladder_bytes.check_feasible(self._requests[cell])
        self._report = {}
        for name, kind in self._settings.kinds.items():
            text = replace(kind, **{**size, "windows": self._settings.report_windows})
            corpus = load_text(text, "report", context.llm, progress=config.progress)
            for draw in self._contexts.values():
                ensure_disjoint(draw.corpus, corpus)
            self._report[name] = MaskScorer(context.llm, corpus, context.store)

    def cost_jobs(self) -> list[Job[CostRow]]:
        """The one-shot costs on every draw.

        They are always measured: `LiveContext.level_costs` would return the packaged costs for
        every draw of text that the default model writes.
        """
        return [
            Job(CostRow, draw, self._depends_on(own.scorer), partial(self._costs, draw, own.scorer))
            for draw, own in self._contexts.items()
        ]

    def plan_jobs(self, costs: Mapping[Draw, LevelCosts]) -> Iterator[Job[PlanRow]]:
        """The knapsack's plans from each draw, for each cell, and each text to judge them on."""
        chosen_on = dict(costs)
        for seed in self._settings.seeds:
            parts = [costs[Draw(kind, seed)] for kind in self._settings.kinds]
            chosen_on[Draw(ALL, seed)] = mean_costs(parts)
        levels = {item.name: item.levels for item in self._ladder.items}
        for name, scorer in self._report.items():
            for draw, own in chosen_on.items():
                policy = KnapsackPolicy(self._memory, own, levels=levels)
                made_of = digest([own.one_shot, own.errors, own.joint])
                depends_on = self._depends_on(scorer, costs=made_of)
                for cell, request in self._requests.items():
                    plan, identity = policy.choose(request), (*draw, cell, name)
                    make = partial(_plan_row, scorer, plan, identity)
                    plans = [Plan(), plan]
                    yield Job(PlanRow, identity, depends_on, make, scorer=scorer, plans=plans)

    def _costs(self, draw: Draw, scorer: MaskScorer) -> CostRow:
        levels, together = self._ladder.cache_levels, self._ladder.together
        costs = scan_levels(scorer, levels, together=together, progress=self._progress)
        scorer.release()
        return CostRow(*draw, asdict(costs))

    def _depends_on(self, scorer: MaskScorer, **more: Any) -> dict[str, Any]:
        scores = digest(with_levels(scorer.context))
        return {"scores": scores, "ladder": self._ladder.spec, **more}


def _plan_row(scorer: MaskScorer, plan: Plan, identity: tuple[str, int, str, str]) -> PlanRow:
    delta_nll = scorer.window_nll(plan) - scorer.window_nll(Plan())
    return PlanRow(*identity, delta_nll.tolist())


class TextStudy:
    """All rows of a study of texts.

    Attributes:
        kinds: Kinds of text.
        cells: Requests with budgets.
    """

    def __init__(self, rows: Sequence[Record]) -> None:
        self._costs = [row for row in rows if isinstance(row, CostRow)]
        plans = [row for row in rows if isinstance(row, PlanRow)]
        self._windows = {
            (p.chosen_on, p.seed, p.cell, p.judged_on): p.window_delta_nll for p in plans
        }
        self.kinds = list(dict.fromkeys(row.judged_on for row in plans))
        self.cells = list(dict.fromkeys(row.cell for row in plans))
        self._seeds = list(dict.fromkeys(row.seed for row in plans))
        self._ladder = plans[0].depends_on["ladder"]

    def losses(self, chosen_on: str, judged_on: str, cells: Sequence[str]) -> Losses:
        """ΔNLL of plans, mean over some cells."""
        windows = [
            [self._windows[chosen_on, seed, cell, judged_on] for cell in cells]
            for seed in self._seeds
        ]
        return np.asarray(np.mean(windows, axis=1))

    @property
    def matrix(self) -> dict[str, list[Losses]]:
        """ΔNLL, mean over cells: for what plans were chosen on, on each kind."""
        chosen_on = [*self.kinds, ALL]
        return {c: [self.losses(c, kind, self.cells) for kind in self.kinds] for c in chosen_on}

    def gap(self, rival: str) -> Estimate | None:
        """ΔNLL of the plans of `ALL` or `OTHERS` divided by that of the own kind's, minus 1.

        The geometric mean over kinds and cells; None where `paired_ratio` has none. Kinds have
        equally many windows, drawn independently, so that they may be resampled jointly.
        """
        firsts, seconds = [], []
        for kind in self.kinds:
            rivals = [ALL] if rival == ALL else [name for name in self.kinds if name != kind]
            for cell in self.cells:
                firsts.append(np.concatenate([self.losses(r, kind, [cell]) for r in rivals]))
                seconds.append(self.losses(kind, kind, [cell]))
        return relative_ratio(firsts, seconds)

    @property
    def verdict(self) -> str:
        """What a policy would gain that sees the kind of text, in words."""
        gap, others = self.gap(ALL), self.gap(OTHERS)
        if gap is None:
            return "The gap is unknown: some mean ΔNLL is not significantly above 0."
        limit = f"{100 * THRESHOLD:g} %"
        answer = "may be above or below"  # the interval contains the threshold
        if not gap.low <= THRESHOLD < gap.high:
            answer = "is above" if gap.low > THRESHOLD else "is not above"
        return (
            f"The gap {answer} {limit}: relative to plans from costs on the text's own kind, plans "
            f"from costs on all kinds have a ΔNLL of {relative_words(gap)}, and those from costs "
            f"on one of {OTHERS} of {relative_words(others)} (geometric mean over kinds and "
            "requests, with a 95 % interval over windows and draws)."
        )

    def agreement_table(self) -> Table:
        """Table of rank agreement between draws, by kind of item and level."""
        # Two seeds may draw the same windows, which agree by themselves.
        hashes = [(row.kind, row.costs["provenance"]["text"]["sha256"]) for row in self._costs]
        different = dict(zip(hashes, self._costs, strict=True)).values()
        draws = [(row.kind, self._by_level(row.costs["one_shot"])) for row in different]
        rows = []
        for level in (level for level, costs in draws[0][1].items() if len(costs) > 1):
            taus: dict[bool, list[float]] = {True: [], False: []}
            for (kind, first), (other, second) in combinations(draws, 2):
                taus[kind == other].append(kendall_tau(first[level], second[level]))
            shown = [
                f"{np.mean(values):.2f} [{min(values):.2f}, {max(values):.2f}]" if values else "-"
                for values in taus.values()
            ]
            rows.append([level, *shown])
        return ["Items and level", "Within a kind", "Between kinds"], rows

    def _by_level(self, one_shot: dict[str, dict[str, float]]) -> dict[str, list[float]]:
        """Costs of the ladder's levels by kind of item and level, and all of them.

        Levels that caches take together are left out: their costs are shares of one measurement.
        """
        ladder = self._ladder
        by_level: dict[str, list[float]] = {"all": []}
        for item, costs in one_shot.items():
            kind = item.partition(".")[2] or item
            group = {"cache": "caches", EMBEDDINGS: EMBEDDINGS}.get(kind, "weights")
            for level, cost in costs.items():
                shared = kind == "cache" and level in ladder["together"]
                if level in ladder["levels"][group] and not shared:
                    by_level["all"].append(cost)
                    by_level.setdefault(f"{kind} {level}", []).append(cost)
        return by_level

    def matrix_table(self) -> Table:
        """Table of `matrix`."""
        rows = [
            [name, *(str(bootstrap_mean(losses)) for losses in row), f"{np.mean(row):.3f}"]
            for name, row in self.matrix.items()
        ]
        return ["Chosen on", *self.kinds, "mean"], rows


def text_tables(study: TextStudy) -> list[TitledTable]:
    """Agreement of costs, and ΔNLL by the texts that plans were chosen on and judged on."""
    return [
        TitledTable(study.agreement_table(), "Agreement of costs", AGREEMENT),
        TitledTable(study.matrix_table(), "Plans by kind of text", MATRIX),
    ]


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
    data=TextStudy,
    words=lambda study: study.verdict,
    frozen=("model", "env.levels", "env.together", "texts.kinds"),
    published=[Published("texts", "texts", untitled)],
)

if __name__ == "__main__":
    launch(STUDY.name, STUDY.run)
