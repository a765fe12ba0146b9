"""``python -m experiments.ladder``: loss against bytes, by precision, by removal, and by both."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from experiments.config import Config
from experiments.config.studies import LadderConfig
from experiments.contexts import build_context, held_out_scorer, named_policy
from experiments.ladder.rows import Ladder, LadderRow
from experiments.ladder.tables import ladder_tables, loss_against_bytes
from experiments.study.harness import Job, Study
from experiments.study.records import delta_nll_fields, request_field
from experiments.study.tables import percent
from rap_env.levels import WEIGHT_LEVELS
from rap_env.memory import MemoryModel
from rap_env.model_facts import ModelFacts
from rap_env.models.files.loading import shared_llm
from rap_env.plan import Plan
from rap_env.request import Request
from rap_env.scoring.scorer import MaskScorer


def ladder_jobs(config: Config, folder: Path) -> Iterator[Job[LadderRow]]:
    """Yield the plans of all methods for all requests.

    The knapsack starts from the model as shipped, if its weights are packed, and its uniform
    settings are measured as well. Packaged policies of another model are left out, with a warning.

    Raises:
        UnknownNameError: There is no such policy or level.
        InvalidRequestError: The model cannot serve a request.
    """
    settings, model = config.ladder, config.model
    context = build_context(config)
    report = held_out_scorer(config.evaluate.text, "report", context)
    llm = shared_llm(model.name, device=model.device, dtype=model.dtype, weights="native")
    packed = MaskScorer(llm, report.corpus, context.store) if llm.facts.packed else None
    start = context.memory if packed is None else MemoryModel(llm)
    removal = named_policy(settings.removal, context, context.memory)
    knapsack = named_policy(settings.knapsack, context, start)
    for shape in settings.shapes:
        whole = Request.at_fraction(context.memory, *shape, 1.0)
        uniform = partial(_job, "uniform", request=whole, fraction=None)
        for name, plan in uniform_plans(settings, context.memory.facts).items():
            yield uniform(name, plan, side=report, report=report)
        for caches in settings.caches if packed else ():
            plan = Plan.uniform(start.facts.num_layers, caches=caches)
            yield uniform(f"as shipped / {caches}", plan, side=packed or report, report=report)
        for method, policy, budgets, side in (
            ("removal", removal, settings.removal_budgets, report),
            ("knapsack", knapsack, settings.budgets, packed or report),
        ):
            for fraction in sorted(set(budgets), reverse=True) if policy else ():
                request = Request.at_fraction(context.memory, *shape, fraction)
                plan = policy.choose(request) if policy else Plan()
                yield _job(
                    method, percent(fraction, 0), plan, request, fraction, side=side, report=report
                )  # fmt: skip


def _job(
    method: str,
    name: str,
    plan: Plan,
    request: Request,
    fraction: float | None,
    *,
    side: MaskScorer,
    report: MaskScorer,
) -> Job[LadderRow]:
    """The job of a plan of the model of `side`; `report` scores the unquantised model."""
    shape = request.batch_size, request.seq_len_tokens
    sizes = MemoryModel(side.llm).breakdown(plan, request)
    fields: dict[str, Any] = {
        "method": method,
        "name": name,
        "request": request_field(shape),
        "budget_fraction": fraction,
        "budget_bytes": None if fraction is None else request.budget_bytes,
        "held_bytes": sizes.peak - sizes.workspace,
        "peak_bytes": sizes.peak,
        "fits": fraction is None or sizes.peak <= request.budget_bytes,
        "levels": plan.levels,
        "packed": side is not report,
    }

    def measure(provenance: dict[str, Any]) -> LadderRow:
        delta_nll = side.window_nll(plan) - report.window_nll(Plan())
        return LadderRow(**fields, **delta_nll_fields(delta_nll), provenance=provenance)

    return Job(
        LadderRow, (method, name, shape), {**report_identity(side), "plan": plan.levels}, measure
    )


def report_identity(report: MaskScorer) -> dict[str, Any]:
    """What a row depends on: the model and the text."""
    facts = report.llm.facts
    return {
        "model_fingerprint": facts.fingerprint,
        "dtype": facts.dtype,
        "weights": facts.weights,
        "report_text": report.corpus.provenance,
        "report_sha256": report.corpus.sha256,
    }


def uniform_plans(settings: LadderConfig, facts: ModelFacts) -> dict[str, Plan]:
    """Plans with one level of weights and one of caches, by name; levels that exist.

    Embeddings with the head are at int8 wherever weights are lowered, if they have that level.
    """
    plans = {}
    for level in WEIGHT_LEVELS:
        if level not in settings.weights or not all(
            level in facts.weight_levels(index) for index in range(facts.num_blocks)
        ):
            continue
        lowered = level != "native" and "int8" in facts.embedding_levels
        for caches in settings.caches:
            plans[f"{level} / {caches}"] = Plan.uniform(
                facts.num_layers,
                weights=level,
                caches=caches,
                embeddings="int8" if lowered else "native",
            )
    return plans


STUDY = Study(
    "ladder",
    "The ladder",
    [LadderRow],
    ladder_jobs,
    ladder_tables,
    data=Ladder.of,
    figures={"loss_against_bytes": loss_against_bytes},
    frozen=("model", "evaluate.text"),
)
