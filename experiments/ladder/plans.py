"""Plans that the ladder compares: uniform settings, removal alone, and a knapsack over levels."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

from agents.baselines import BASELINES, make_baseline
from experiments.config.ladder import LadderConfig
from experiments.study.tables import percent
from rap_env.context.base import PruningContext
from rap_env.errors import ArtifactError
from rap_env.levels import WEIGHT_LEVELS
from rap_env.memory import MemoryModel
from rap_env.model_facts import ModelFacts
from rap_env.plan import CompressionPlan, as_plan
from rap_env.policies.base import Policy
from rap_env.policies.loading import load_policy
from rap_env.request import Request

log = logging.getLogger(__name__)

PACKAGED = ("frontier", "knapsack")
"""Policies that the package has for the default model."""

SHIPPED = "as shipped"
"""Name of the packed weights of a model's file in uniform settings."""


@dataclass(frozen=True)
class Candidate:
    """A plan of one method for one request.

    Attributes:
        method: One of `experiments.ladder.records.METHODS`.
        name: Name of the setting, or the budget in per cent.
        budget_fraction: Budget as a fraction of the unquantised peak; None for a uniform setting.
        packed: Whether it is a plan of the model with packed weights.
    """

    method: str
    name: str
    request: Request
    plan: CompressionPlan
    budget_fraction: float | None = None
    packed: bool = False


def candidates(
    settings: LadderConfig, context: PruningContext, packed: MemoryModel | None = None
) -> Iterator[Candidate]:
    """Yield the plans of all methods for all requests.

    Args:
        settings: Requests, levels, policies and budgets.
        context: The context of the unquantised model.
        packed: The byte arithmetic of the model as shipped, if its weights are packed: the
            knapsack then starts from it, and its uniform settings are listed as well.

    Policies of the package that are of another model are left out, with a warning.

    Raises:
        UnknownNameError: There is no such policy or level.
        InvalidRequestError: The model cannot serve a request.
    """
    memory, start = context.memory, packed or context.memory
    removal = named_policy(settings.removal, context, memory)
    knapsack = named_policy(settings.knapsack, context, start)
    for shape in settings.shapes:
        whole = Request.at_fraction(memory, *shape, 1.0)
        for name, plan in uniform_plans(settings, memory.facts).items():
            yield Candidate("uniform", name, whole, plan)
        if packed is not None:
            for caches in settings.caches:
                plan = CompressionPlan.uniform(packed.facts.num_layers, caches=caches)
                yield Candidate("uniform", f"{SHIPPED} / {caches}", whole, plan, packed=True)
        for method, policy, budgets, of_packed in (
            ("removal", removal, settings.removal_budgets, False),
            ("knapsack", knapsack, settings.budgets, packed is not None),
        ):
            for fraction in sorted(set(budgets), reverse=True) if policy else ():
                request = Request.at_fraction(memory, *shape, fraction)
                plan = as_plan(policy.choose(request)) if policy else CompressionPlan()
                yield Candidate(
                    method, percent(fraction, 0), request, plan, fraction, packed=of_packed
                )


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


def named_policy(name: str | None, context: PruningContext, memory: MemoryModel) -> Policy | None:
    """The policy of a name: a baseline that searches on the calibration text, or a packaged one.

    None without a name, or if the packaged one is of another model.
    """
    if name is None:
        return None
    if name in BASELINES and name not in PACKAGED:
        return make_baseline(name, context)
    try:
        return load_policy(name, memory)
    except ArtifactError as error:
        if name not in PACKAGED:
            raise
        log.warning("Without the packaged policy %s: %s", name, error)
        return None
