"""``python -m experiments.levels``: what each level costs, and what the knapsack's plans cost.

Levels are measured on the calibration text; the knapsack's plans for a grid of requests and budgets
on a text that no level was measured on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.comparison.records import Record, delta_nll_fields, write_records
from experiments.comparison.run_folder import RunFolder
from experiments.config import Config
from experiments.config.common import Cell
from experiments.config.evaluation import LEVELS_SUFFIX
from experiments.contexts import build_context, held_out_scorer, kind_contexts
from experiments.errors import ExperimentError
from experiments.launch import launch
from rap_env.artifacts import save_artifact
from rap_env.context.opening import require_live
from rap_env.importance.kind_costs import KindCosts
from rap_env.importance.level_costs import LevelCosts
from rap_env.importance.level_scan import measure_jointly, scan_levels
from rap_env.importance.text_kinds import LEAST_TOKENS, TextKinds
from rap_env.memory import MemoryModel
from rap_env.model_facts import ModelFacts
from rap_env.models.progress import progress_bar
from rap_env.plan import CompressionPlan, as_plan
from rap_env.policies.base import Policy
from rap_env.policies.knapsack import KnapsackPolicy
from rap_env.policies.loading import FACTS_VERSION
from rap_env.request import Request
from rap_env.scoring.scorer import MaskScorer, bar_callback

log = logging.getLogger(__name__)

COSTS_FILE = "levels.json"
GRID_FILE = "grid.jsonl"
KINDS_FILE = "kinds.json"
_FROZEN = (
    "model",
    "calibration",
    "levels.caches",
    "levels.requests",
    "levels.joint_budgets",
    "kinds",
)


@dataclass(frozen=True)
class PlanRow(Record):
    """A plan for a request at a budget, and its rise in NLL, nats per token.

    Attributes:
        policy: Name of what chose the plan.
        request: ``{"batch_size": int, "seq_len_tokens": int}``.
        budget_fraction: Budget as a fraction of the peak of the unquantised model.
        budget_bytes: The budget.
        peak_bytes: Predicted peak of the plan.
        fits: Whether it is within the budget.
        levels: Levels of the items that are not native, by name.
        predicted: Rise in NLL that the policy predicts; None if it predicts none.
        loss: Rise in NLL on the report text, with its 95 % interval over windows.
        decision_s: Seconds that the choice took.
    """

    record_name = "A row of a plan"
    identity = ("policy", "request", "budget_fraction")

    policy: str
    request: dict[str, int]
    budget_fraction: float
    budget_bytes: int
    peak_bytes: int
    fits: bool
    levels: dict[str, str]
    predicted: float | None
    loss: float
    loss_ci_low: float
    loss_ci_high: float
    window_losses: list[float]
    decision_s: float
    provenance: dict[str, Any]


def levels(config: Config, folder: Path) -> Path:
    """Measure the costs of levels and the plans of the knapsack; existing results are kept.

    The folder gets ``levels.json`` and ``grid.jsonl``, and ``kinds.json`` with `kinds`. With
    `levels.out`, the costs are also written there, and the model's facts beside them.

    Returns:
        The path of ``levels.json``.

    Raises:
        ExperimentError: The folder has results of another model, text or other levels, or the
            calibration is too short for `kinds`.
    """
    check_kinds(config)
    run, started = RunFolder(folder), time.monotonic()
    run.start(config, frozen=_FROZEN)
    context = require_live(build_context(config, profiled=False))
    reference = MemoryModel(unquantised_facts(config))
    path, settings = folder / COSTS_FILE, config.levels
    if settings.out is not None:
        facts_path = Path(settings.out.removesuffix(LEVELS_SUFFIX) + ".facts.json")
        save_facts(facts_path, {"native": context.memory.facts, "bf16": reference.facts})
    if config.kinds and not (folder / KINDS_FILE).exists():
        kind_costs(config).save(folder / KINDS_FILE)
    if path.exists():
        costs = LevelCosts.load(path, context.memory)
    else:
        costs = scan_levels(context.scorer, settings.caches, progress=config.progress)
        joint = grid(reference, settings.shapes, settings.joint_budgets)
        policy = KnapsackPolicy(context.memory, costs)
        plans = list(dict.fromkeys(policy.choose(request) for _, request in joint))
        costs = measure_jointly(costs, context.scorer, plans, progress=config.progress)
        costs.save(path)
    if settings.out is not None:
        costs.save(settings.out)
    for row in costs.predictions():
        log.info(
            "Predicted %.4f, measured %.4f: %s", row["predicted"], row["measured"], row["plan"]
        )
    policy = KnapsackPolicy(context.memory, costs)
    cells = grid(reference, settings.shapes, settings.budgets)
    scorer = held_out_scorer(settings.text, "report", context)
    predict, progress = policy.delta_nll, config.progress
    rows = plan_rows(policy, context.memory, cells, scorer, predict, progress=progress)
    write_records(folder / GRID_FILE, [row.to_record() for row in rows])
    run.finish(started, **summary(rows))
    log.info("Levels: %s; grid: %s.", path, summary(rows))
    return path


def check_kinds(config: Config) -> None:
    """Check that kinds of text, if there are any, can be told apart.

    Raises:
        ExperimentError: A text is too short.
    """
    text = config.calibration
    for name, kind in config.kinds.items():
        if (windows := kind.windows or text.windows) * text.window_tokens < LEAST_TOKENS:
            raise ExperimentError(
                f"kinds needs at least {LEAST_TOKENS} tokens of each kind, to tell kinds apart, "
                f"and those of {name} are {windows} x {text.window_tokens}; give more windows or "
                "longer ones."
            )


def kind_costs(config: Config) -> KindCosts:
    """Measure the costs of levels on the text of each kind, and learn to tell the kinds apart."""
    contexts = {
        name: require_live(context)
        for name, context in kind_contexts(config, profiled=False).items()
    }
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
    reference: MemoryModel, shapes: Sequence[tuple[int, int]], budgets: Sequence[float]
) -> list[tuple[Cell, Request]]:
    """Every cell with its request; budgets are fractions of the reference model's peak."""
    return [
        ((*shape, fraction), Request.at_fraction(reference, *shape, fraction))
        for shape in shapes
        for fraction in sorted(set(budgets), reverse=True)
    ]


def plan_rows(
    policy: Policy,
    memory: MemoryModel,
    cells: Sequence[tuple[Cell, Request]],
    scorer: MaskScorer,
    predict: Callable[[CompressionPlan, int], float] | None = None,
    *,
    progress: bool = True,
) -> list[PlanRow]:
    """Let a policy choose at every cell, and measure its plans.

    Args:
        policy: Chooses masks or plans.
        memory: Byte arithmetic of the model.
        cells: Requests with the cells they stand for.
        scorer: Measures plans on text on which nothing was searched.
        predict: Predicted rise in NLL of a plan at a sequence length.
        progress: Whether to show a progress bar.
    """
    chosen = []
    for _, request in cells:
        began = time.perf_counter()
        plan = as_plan(policy.choose(request))
        chosen.append((plan, time.perf_counter() - began))
    plans = list(dict.fromkeys(plan for plan, _ in chosen))
    with progress_bar(progress, total=len(plans), desc=policy.name, unit="plan") as bar:
        scorer.nll_many(plans, bar_callback(bar))  # steps that plans share run once
    native, rows = scorer.window_nll(CompressionPlan()), []
    for ((batch, length, fraction), request), (plan, seconds) in zip(cells, chosen, strict=True):
        peak_bytes = memory.peak_bytes(plan, request)
        rows.append(
            PlanRow(
                policy=policy.name,
                request={"batch_size": batch, "seq_len_tokens": length},
                budget_fraction=fraction,
                budget_bytes=request.budget_bytes,
                peak_bytes=peak_bytes,
                fits=peak_bytes <= request.budget_bytes,
                levels=plan.levels,
                predicted=None if predict is None else predict(plan, length),
                **delta_nll_fields(scorer.window_nll(plan) - native),
                decision_s=seconds,
                provenance=scorer.provenance,
            )
        )
    return rows


def summary(rows: Sequence[PlanRow]) -> dict[str, Any]:
    """Mean rise in NLL of rows, how many fit, and the mean error of what was predicted."""
    errors = [abs(row.predicted - row.loss) for row in rows if row.predicted is not None]
    return {
        "loss": float(np.mean([row.loss for row in rows])),
        "fits": sum(row.fits for row in rows),
        "of": len(rows),
        "prediction_error": float(np.mean(errors)) if errors else None,
    }


if __name__ == "__main__":
    launch("levels", levels)
