"""Plans that the ladder compares: uniform settings, removal alone, and a knapsack over levels."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

from agents.baselines import BASELINES, make_baseline
from experiments.comparison.formatting import percent
from experiments.config.ladder import LadderConfig
from rap_env.context.base import PruningContext
from rap_env.errors import ArtifactError
from rap_env.levels import WEIGHT_LEVELS
from rap_env.memory import MemoryModel, ModelFacts
from rap_env.plan import CompressionPlan, as_plan
from rap_env.policy import PlanPolicy
from rap_env.request import Request
from rap_env.runtime.policies import load_policy

log = logging.getLogger(__name__)

PACKAGED = ("frontier", "knapsack")
"""Policies that the package has for the default model."""


@dataclass(frozen=True)
class Candidate:
    """A plan of one method for one request.

    Attributes:
        method: One of `experiments.ladder.records.METHODS`.
        name: Name of the setting, or the budget in per cent.
        budget_fraction: Budget as a fraction of the unquantised peak; None for a uniform setting.
    """

    method: str
    name: str
    request: Request
    plan: CompressionPlan
    budget_fraction: float | None = None


def candidates(settings: LadderConfig, context: PruningContext) -> Iterator[Candidate]:
    """Yield the plans of all methods for all requests.

    Policies of the package that are of another model are left out, with a warning.

    Raises:
        UnknownNameError: There is no such policy or level.
        InvalidRequestError: The model cannot serve a request.
    """
    memory = context.memory
    policies = {
        "removal": (settings.removal, settings.removal_budgets),
        "knapsack": (settings.knapsack, settings.budgets),
    }
    loaded = {
        method: (policy, budgets)
        for method, (name, budgets) in policies.items()
        if name is not None and budgets and (policy := _policy(name, context)) is not None
    }
    for shape in settings.shapes:
        for name, plan in uniform_plans(settings, memory.facts).items():
            yield Candidate("uniform", name, Request.at_fraction(memory, *shape, 1.0), plan)
        for method, (policy, budgets) in loaded.items():
            for fraction in sorted(set(budgets), reverse=True):
                request = Request.at_fraction(memory, *shape, fraction)
                plan = as_plan(policy.choose(request))
                yield Candidate(method, percent(fraction, 0), request, plan, fraction)


def uniform_plans(settings: LadderConfig, facts: ModelFacts) -> dict[str, CompressionPlan]:
    """Plans with one level of weights and one of caches, by name; levels that exist.

    Embeddings with the head are at int8 wherever weights are lowered, if they have that level.
    """
    found = {}
    for level in WEIGHT_LEVELS:
        if level not in settings.weights or not all(
            level in facts.weight_levels(index) for index in range(facts.num_blocks)
        ):
            continue
        lowered = level != "native" and "int8" in facts.embedding_levels
        for caches in settings.caches:
            found[f"{level} / {caches}"] = CompressionPlan.uniform(
                facts.num_layers,
                weights=level,
                caches=caches,
                embeddings="int8" if lowered else "native",
            )
    return found


def _policy(name: str, context: PruningContext) -> PlanPolicy | None:
    """The policy of a name: a baseline that searches on the calibration text, or a packaged one.

    None if the packaged one is of another model.
    """
    if name in BASELINES and name not in PACKAGED:
        return make_baseline(name, context)
    try:
        return load_policy(name, MemoryModel(context.memory.facts))
    except ArtifactError as error:
        if name not in PACKAGED:
            raise
        log.warning("Without the packaged policy %s: %s", name, error)
        return None
