"""``python -m experiments.levels``: what each level costs, and what the knapsack's plans cost.

Levels are measured on the calibration text; the knapsack's plans for a grid of requests and budgets
on a text that no level was measured on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from experiments.config import Config
from experiments.config.evaluation import LEVELS_SUFFIX
from experiments.contexts import build_context, context_config, held_out_scorer, reject_table
from experiments.errors import ExperimentError
from experiments.launch import launch
from experiments.study.harness import Job, Study
from experiments.study.records import CellRecord, Shape, delta_nll_fields, request_field
from experiments.study.tables import (
    TitledTable,
    columns_table,
    mebibytes,
    percent,
    shape_words,
)
from rap_env.artifacts import digest, save_artifact
from rap_env.context.base import PruningContext
from rap_env.context.live import LiveContext
from rap_env.context.opening import open_context, require_live
from rap_env.importance.kind_costs import KindCosts
from rap_env.importance.level_costs import LevelCosts
from rap_env.importance.level_scan import measure_jointly, scan_levels
from rap_env.importance.text_kinds import LEAST_TOKENS, TextKinds
from rap_env.memory import MemoryModel
from rap_env.model_facts import ModelFacts
from rap_env.plan import Plan
from rap_env.policies.knapsack import KnapsackPolicy
from rap_env.policies.packaged_files import FACTS_VERSION
from rap_env.request import Request
from rap_env.scoring.scorer import MaskScorer

log = logging.getLogger(__name__)

COSTS_FILE, KINDS_FILE = "levels.json", "kinds.json"

CAPTION = (
    "Plans of the knapsack over levels at shares of the unquantised model's peak: ΔNLL over native "
    "weights as predicted from the costs of single levels, and as measured on text on which "
    "nothing was measured before, nats per token with a 95 % interval over windows."
)


@dataclass(frozen=True)
class PlanRow(CellRecord):
    """A plan for a request at a budget, a fraction of the peak of the unquantised model.

    For the other fields see `CellRecord`.

    Attributes:
        policy: Name of what chose the plan.
        fits: Whether its peak is within the budget.
        levels: Levels of the items that are not native, by name.
        predicted: ΔNLL that the policy predicts, nats per token.
        decision_s: Seconds that the choice took.
    """

    file = "grid.jsonl"
    record_name = "A row of a plan"
    identity = ("policy", "request", "budget_fraction")

    policy: str
    fits: bool
    levels: dict[str, str]
    predicted: float
    decision_s: float


def plan_jobs(config: Config, folder: Path) -> Iterator[Job[PlanRow]]:
    """Measure the costs of levels, then yield the knapsack's plan for each request and budget.

    The folder gets ``levels.json``, and ``kinds.json`` with `kinds`; existing files are kept. With
    `levels.out`, the costs are also written there, and the model's facts beside them.

    Raises:
        ExperimentError: The calibration is too short for `kinds`.
    """
    check_kinds(config)
    context = require_live(build_context(config, profiled=False))
    memory, reference = context.memory, MemoryModel(unquantised_facts(config))
    settings = config.levels
    if settings.out is not None:
        facts_path = Path(settings.out.removesuffix(LEVELS_SUFFIX) + ".facts.json")
        save_facts(facts_path, {"native": memory.facts, "bf16": reference.facts})
    if config.kinds and not (folder / KINDS_FILE).exists():
        kind_costs(config).save(folder / KINDS_FILE)
    costs = _costs(config, context, reference, folder / COSTS_FILE)
    if settings.out is not None:
        costs.save(settings.out)
    policy = KnapsackPolicy(memory, costs)
    scorer = held_out_scorer(settings.text, "report", context)
    for fraction, request in grid(reference, settings.shapes, settings.budgets):
        began = time.perf_counter()
        plan = policy.choose(request)
        field = request_field((request.batch_size, request.seq_len_tokens))
        chosen = {
            "policy": policy.name,
            "request": field,
            "budget_fraction": fraction,
            "budget_bytes": request.budget_bytes,
            "peak_bytes": (peak_bytes := memory.peak_bytes(plan, request)),
            "fits": peak_bytes <= request.budget_bytes,
            "levels": plan.levels,
            "predicted": policy.delta_nll(plan, request.seq_len_tokens),
            "decision_s": time.perf_counter() - began,
        }
        depends_on = {"scores": digest(dict(scorer.plan_context)), "levels": plan.levels}
        yield Job(
            PlanRow,
            (policy.name, field, fraction),
            depends_on,
            partial(_measured, scorer, plan, chosen),
            facts=scorer.provenance,
            scorer=scorer,
            plans=[Plan(), plan],
        )


def _measured(
    scorer: MaskScorer, plan: Plan, chosen: dict[str, Any], provenance: dict[str, Any]
) -> PlanRow:
    delta_nll = scorer.window_nll(plan) - scorer.window_nll(Plan())
    return PlanRow(**chosen, **delta_nll_fields(delta_nll), provenance=provenance)


def _costs(config: Config, context: LiveContext, reference: MemoryModel, path: Path) -> LevelCosts:
    """Return the costs of all levels, corrected by those of the knapsack's plans at low budgets."""
    settings, progress = config.levels, config.progress
    if path.exists():
        return LevelCosts.load(path, context.memory)
    costs = scan_levels(context.scorer, settings.caches, progress=progress)
    joint = grid(reference, settings.shapes, settings.joint_budgets)
    policy = KnapsackPolicy(context.memory, costs)
    plans = list(dict.fromkeys(policy.choose(request) for _, request in joint))
    costs = measure_jointly(costs, context.scorer, plans, progress=progress)
    costs.save(path)
    for row in costs.predictions():
        log.info(
            "Predicted %.4f, measured %.4f: %s", row["predicted"], row["measured"], row["plan"]
        )
    return costs


def check_kinds(config: Config) -> None:
    """Check that kinds of text, if there are any, can be told apart.

    Raises:
        ExperimentError: A text is too short.
    """
    for name, kind in config.kinds.items():
        text = replace(config.calibration, **kind)
        if text.windows * text.window_tokens < LEAST_TOKENS:
            raise ExperimentError(
                f"kinds needs at least {LEAST_TOKENS} tokens of each kind, to tell kinds apart, "
                f"and those of {name} are {text.windows} x {text.window_tokens}; give more windows "
                "or longer ones."
            )


def kind_contexts(config: Config) -> dict[str, PruningContext]:
    """Return a context for the text of each kind, by its name, in the order of `Config.kinds`.

    All texts are read before anything is measured. Errors are those of `build_context`.
    """
    reject_table(config)
    settings, contexts = context_config(config, profiled=False), {}
    for name, kind in config.kinds.items():
        text = replace(settings.calibration, **kind)
        contexts[name] = open_context(replace(settings, calibration=text))
    return contexts


def kind_costs(config: Config) -> KindCosts:
    """Measure the costs of levels on the text of each kind, and learn to tell the kinds apart."""
    contexts = {name: require_live(context) for name, context in kind_contexts(config).items()}
    texts = {name: context.corpus.tokens.numpy() for name, context in contexts.items()}
    kinds = TextKinds.of(texts, next(iter(contexts.values())).memory.facts.vocab_size)
    costs = {}
    for name, context in contexts.items():
        log.info("Levels on %s.", name)
        costs[name] = scan_levels(context.scorer, config.levels.caches, progress=config.progress)
        context.scorer.release()
    return KindCosts(kinds, costs)


def unquantised_facts(config: Config) -> ModelFacts:
    """Facts of the model with unquantised weights, whose peak budgets are fractions of."""
    from rap_env.models.files.loading import load_llm

    model = config.model
    return load_llm(model.name, device=model.device, dtype=model.dtype, weights="bf16").facts


def save_facts(path: Path, facts: Mapping[str, ModelFacts]) -> None:
    """Write the facts of a model by the format its weights are loaded in, for `rap choose`."""
    body = {weights: asdict(known) for weights, known in facts.items()}
    save_artifact(path, "model facts", FACTS_VERSION, body)


def grid(
    reference: MemoryModel, shapes: Sequence[Shape], budgets: Sequence[float]
) -> list[tuple[float, Request]]:
    """Every request with its budget as a fraction of the reference model's peak."""
    return [
        (fraction, Request.at_fraction(reference, *shape, fraction))
        for shape in shapes
        for fraction in sorted(set(budgets), reverse=True)
    ]


def plan_tables(rows: Sequence[PlanRow]) -> list[TitledTable]:
    """The plans of each request and budget: ΔNLL, as predicted and as measured."""
    columns: dict[str, Callable[[PlanRow], str]] = {
        "Request": lambda row: shape_words(row.shape),
        "Budget": lambda row: percent(row.budget_fraction, 0),
        "Peak": lambda row: mebibytes(row.peak_bytes),
        "Predicted": lambda row: f"{row.predicted:.3f}",
        "ΔNLL": lambda row: str(row.estimate),
    }
    return [TitledTable(columns_table(rows, columns), "Plans of the knapsack", CAPTION)]


STUDY = Study(
    "levels",
    "Levels",
    [PlanRow],
    plan_jobs,
    plan_tables,
    frozen=("model", "calibration", "levels.caches", "levels.requests", "levels.joint_budgets",
            "kinds"),
)  # fmt: skip

if __name__ == "__main__":
    launch(STUDY.name, STUDY.run)
