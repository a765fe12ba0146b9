"""``python -m experiments.studies.gradient_plans``: plans from costs of levels by gradient.

The knapsack chooses at each pinned budget from costs by gradient
(`rap_env.importance.gradient_costs`), and from costs that a score table has, which were
measured one by one. All plans are measured on held-out text of several kinds, and on the text
of the gradients, where predictions are compared with what was measured.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from experiments.config import Config
from experiments.contexts import load_model, load_text, measured_on
from experiments.launch import launch
from experiments.study.harness import Job, Published, Study
from experiments.study.json_records import Record
from experiments.study.statistics import paired_ratio, relative_difference
from experiments.study.table_format import TitledTable, percent, relative_words
from rap_env.artifacts import digest
from rap_env.context.opening import open_store
from rap_env.importance.gradient_costs import gradient_costs
from rap_env.importance.level_costs import LevelCosts
from rap_env.ladder.items import Ladder
from rap_env.memory import MemoryModel
from rap_env.models.live.calibration_text import mixed_windows
from rap_env.models.live.elastic import ElasticLLM
from rap_env.plan import Plan
from rap_env.policies.knapsack import KnapsackPolicy
from rap_env.request import Request
from rap_env.scoring.corpus import Corpus, ensure_disjoint
from rap_env.scoring.held_out import spearman
from rap_env.scoring.score_table import TABLES, ScoreTable
from rap_env.scoring.scorer import PlanScorer

COSTS_FILE = "gradient_costs.json"
KINDS = ONE_BY_ONE, GRADIENT = "one by one", "by gradient"
"""Kinds of costs: those of the score table, and those of the run."""
CALIBRATION = "calibration"
"""Name of the text that gradients are of, beside those of ``gradient_plans.texts``."""
CODE = "Python code"
"""Name of the text of Python's standard library."""
ALL = "all"
"""Name of all held-out text."""
MILD_NLL = 0.2
"""Budgets are mild where uniform settings lose at most this, nats per token."""

LOSSES = (
    "Mean ΔNLL (nats/token) over budgets of the knapsack's plans from costs measured one by one "
    "and from costs by gradient, on held-out windows of each kind of text, and the relative "
    "difference with a 95 % interval over windows; and the geometric mean over budgets of the "
    "ratio of both losses. Mild budgets: those at which a good uniform setting loses at most "
    f"{MILD_NLL} nats."
)
PREDICTED = (
    "Predicted ΔNLL of these plans and what they lose on the text of the gradients: Spearman's "
    "rank correlation, mean relative error, sum of predictions over that of losses; and the "
    "evaluations of the whole model that the costs took. Costs one by one are of another text."
)
BUDGETS = "The same on all text at each budget: batch size x tokens @ bytes ~ uniform's loss."


@dataclass(frozen=True)
class GradientPlanRow(Record):
    """The knapsack's plan at one budget from one kind of costs.

    Attributes:
        costs: `GRADIENT` or `ONE_BY_ONE`.
        budget: The request and its budget, as in ``evaluate.pinned``.
        levels: Lowered items with their levels.
        predicted_delta_nll: Sum of the costs, nats per token, at the length of the windows.
        uniform_delta_nll: What a uniform setting loses there, nats per token.
        evaluations: Evaluations of the whole model that the costs took.
        window_delta_nll: ΔNLL of each window of each text, nats per token, by its name.
    """

    file = "gradient_plans.jsonl"
    identity = ("costs", "budget")

    costs: str
    budget: str
    levels: dict[str, str]
    predicted_delta_nll: float
    uniform_delta_nll: float
    evaluations: int
    window_delta_nll: dict[str, list[float]]

    def on(self, text: str) -> npt.NDArray[np.float64]:
        """ΔNLL of each window of a text, (windows,)."""
        held_out = [name for name in self.window_delta_nll if name != CALIBRATION]
        names = held_out if text == ALL else [text]
        return np.concatenate([self.window_delta_nll[name] for name in names])


def plan_jobs(config: Config, folder: Path) -> Iterator[Job[GradientPlanRow]]:
    """Yield the plans of both kinds of costs at all budgets; costs by gradient are made first."""
    settings = config.gradient_plans
    llm = load_model(config)
    memory, table = MemoryModel(llm), ScoreTable.load(TABLES / settings.measured)
    measured = LevelCosts(**(table.levels or {}))
    items = Ladder.of(llm.facts, **config.env.ladder).items
    levels = {i.name: [n for n in i.levels if n in measured.costs[i.name]] for i in items}
    windows = mixed_windows(llm, settings.windows, settings.window_tokens)
    texts = {CALIBRATION: Corpus.of_tokens(windows, source="mixture", role="calibration")}
    try:
        costs = LevelCosts.load(folder / COSTS_FILE, llm)
    except FileNotFoundError:
        costs = gradient_costs(llm, texts[CALIBRATION], levels, progress=config.progress)
        costs.save(folder / COSTS_FILE)
    texts |= report_texts(config, llm)
    for text in list(texts.values())[1:]:
        ensure_disjoint(texts[CALIBRATION], text)
    scorer = PlanScorer(llm, Corpus.concatenated(texts), open_store(config.store))
    ends = np.cumsum([len(text.tokens) for text in texts.values()])[:-1]

    def measure(
        kind: str, budget: str, plan: Plan, used: LevelCosts, uniform: float
    ) -> GradientPlanRow:
        rises = np.split(scorer.window_nll(plan) - scorer.window_nll(Plan()), ends)
        by_text = {name: rise.tolist() for name, rise in zip(texts, rises, strict=True)}
        predicted = used.delta_nll(plan)
        return GradientPlanRow(
            kind, budget, plan.levels, predicted, uniform, used.evaluations, by_text
        )

    for kind, used in {ONE_BY_ONE: measured, GRADIENT: costs}.items():
        policy = KnapsackPolicy(memory, used, levels)
        for cell in config.evaluate.pinned_cells:
            plan = policy.choose(Request(*cell.shape, cell.budget_bytes))
            identity, uniform = (kind, str(cell)), cell.target_delta_nll or 0.0
            make = partial(measure, *identity, plan, used, uniform)
            depends_on = {**measured_on(scorer), "costs": digest(used.costs), "plan": plan.levels}
            yield Job(GradientPlanRow, identity, depends_on, make)


def report_texts(config: Config, llm: ElasticLLM) -> dict[str, Corpus]:
    """The held-out texts by name; ``.py`` files are those of the Python that runs."""
    parts: dict[str, dict[str, Corpus]] = {}
    for text in config.gradient_plans.texts:
        library = sysconfig.get_path("stdlib") if text.source.endswith(".py") else ""
        own = replace(text, source=str(Path(library, text.source)))
        corpus = load_text(own, "report", llm, progress=config.progress)
        parts.setdefault(Path(text.source).parent.name or CODE, {})[text.source] = corpus
    return {name: Corpus.concatenated(corpora) for name, corpora in parts.items()}


def plan_tables(rows: Sequence[GradientPlanRow]) -> list[TitledTable]:
    """Losses by text at mild and at all budgets, predictions, and losses by budget."""
    by_costs = {kind: [row for row in rows if row.costs == kind] for kind in KINDS}
    texts = [name for name in rows[0].window_delta_nll if name != CALIBRATION]

    def each(budgets: Collection[str], text: str) -> list[list[npt.NDArray[np.float64]]]:
        return [[r.on(text) for r in by_costs[kind] if r.budget in budgets] for kind in KINDS]

    def losses(budgets: Collection[str], text: str) -> list[str]:
        one_by_one, gradient = (np.mean(own, axis=0) for own in each(budgets, text))
        difference = relative_words(relative_difference(gradient, one_by_one))
        return [f"{one_by_one.mean():.4f}", f"{gradient.mean():.4f}", difference]

    def mean_ratio(budgets: Collection[str], text: str) -> str:
        one_by_one, gradient = each(budgets, text)
        ratio = paired_ratio(gradient, one_by_one)
        return "-" if ratio is None else f"{ratio.mean:.3f}"

    def predictions(kind: str) -> list[str]:
        predicted = np.array([row.predicted_delta_nll for row in by_costs[kind]])
        measured = np.array([row.on(CALIBRATION).mean() for row in by_costs[kind]])
        rank, error = spearman(predicted, measured), np.abs(predicted / measured - 1).mean()
        evaluations = str(by_costs[kind][0].evaluations)
        sums = f"{predicted.sum() / measured.sum():.2f}"
        return ["-" if rank is None else f"{rank:.3f}", percent(error), sums, evaluations]

    every = [row.budget for row in by_costs[GRADIENT]]
    mild = [row.budget for row in by_costs[GRADIENT] if row.uniform_delta_nll <= MILD_NLL]
    groups = {f"{len(mild)} mild": mild, f"{len(every)}": every}
    header = ["Costs one by one", "Costs by gradient", "Difference"]
    by_text = [[words, text, *losses(budgets, text), mean_ratio(budgets, text)]
               for words, budgets in groups.items() for text in (*texts, ALL)]  # fmt: skip
    titles = ["Costs", "Rank correlation", "Relative error", "Predicted / measured", "Evaluations"]
    return [
        TitledTable(
            (["Budgets", "Text", *header, "Ratio, each budget alike"], by_text),
            "Plans from costs by gradient",
            LOSSES,
        ),
        TitledTable(
            (titles, [[kind.capitalize(), *predictions(kind)] for kind in KINDS]),
            "Predicted and measured losses",
            PREDICTED,
        ),
        TitledTable(
            (["Budget", *header], [[budget, *losses([budget], ALL)] for budget in every]),
            "Losses at each budget",
            BUDGETS,
        ),
    ]


def first_two_tables(text: str) -> str:
    """The first two tables without headings and captions."""
    sections = text.split("\n## ")[1:3]
    return "\n\n".join(section[section.index("\n| ") :].strip() for section in sections)


STUDY = Study(
    "gradient_plans",
    "Plans from costs by gradient",
    [GradientPlanRow],
    plan_jobs,
    plan_tables,
    frozen=("model", "env.levels", "gradient_plans"),
    published=[
        Published("gradient_plans", "gradient_plans", first_two_tables),
        Published("gradient_plans_gemma", "gradient_plans_gemma", first_two_tables),
    ],
)

if __name__ == "__main__":
    launch(STUDY.name, STUDY.run)
