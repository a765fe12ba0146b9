"""A policy's name, or the path of its file, to the policy. No model is run, no torch loaded."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rap_env.artifacts import artifact_kind
from rap_env.context.base import PruningContext
from rap_env.errors import ArtifactError
from rap_env.ladder.ladder_bytes import LadderBytes, mask_bytes
from rap_env.levels import WEIGHT_LEVELS
from rap_env.memory import HasFacts, MemoryModel
from rap_env.plan import Plan
from rap_env.plugins import find_plugin
from rap_env.policies.base import Policy, as_policy
from rap_env.policies.method import Basis, Method
from rap_env.policies.network_policy import KIND
from rap_env.policies.packaged_files import default_facts, packaged_basis
from rap_env.policies.registry import Reader, makes, methods, policy_names, readers
from rap_env.policies.uniform import middle_first, uniform_plans
from rap_env.request import Request

log = logging.getLogger(__name__)

_HINT = (
    "Any other value is read as the path of a file, or as package.module:name of a method or of a "
    "function that makes a policy, and there is no such file."
)


class StaticPolicy(Policy):
    """The same plan for every request."""

    def __init__(self, plan: Plan, name: str = "static") -> None:
        self.plan = plan
        self.name = name

    def choose(self, request: Request) -> Plan:
        """Return the plan."""
        return self.plan


@makes("dense")
def _dense(memory: MemoryModel, basis: Basis | None) -> Policy:
    return StaticPolicy(Plan(), "dense")


class OrderPolicy(Policy):
    """Chooses the first of some plans that fits, else the last one with blocks removed in an order.

    It needs no measured costs.

    Args:
        memory: The model's byte arithmetic.
        order: Indices of blocks in the order in which they are removed.
        plans: Plans from the most to the least exact one, such as `uniform_plans`.
        name: The policy's name.

    Raises:
        UnknownNameError: The model does not have an item or a level of a plan, or a block of
            the order.
    """

    order: tuple[int, ...]

    def __init__(
        self,
        memory: MemoryModel,
        order: Iterable[int],
        plans: Iterable[Plan] = (Plan(),),
        name: str = "order",
    ) -> None:
        self.name = name
        self.memory = memory
        self.order = tuple(order)
        Plan.removing(*self.order).check(memory.facts.num_blocks)
        *first, last = map(memory.check_plan, plans)
        self._plans = (*first, *itertools.accumulate(self.order, Plan.without, initial=last))
        used = last.weight_levels.union(*(plan.weight_levels for plan in first))
        self.weight_levels = tuple(level for level in WEIGHT_LEVELS if level in used)

    def choose(self, request: Request) -> Plan:
        """Return the most exact plan that fits, or the smallest one if none does."""
        return self.memory.first_that_fits(self._plans, request)


def uniform_policy(memory: MemoryModel, order: Iterable[int] = ()) -> OrderPolicy:
    """A rule for a model of which nothing was measured, with levels that need no text.

    It lowers all caches and then all weights, and then removes the blocks of an order.
    """
    facts = memory.facts.without_levels({*WEIGHT_LEVELS} - {"int8", "int4"})
    return OrderPolicy(memory, order, uniform_plans(facts), "uniform")


def load_policy(
    source: str | os.PathLike[str],
    model: HasFacts | MemoryModel | None = None,
    *,
    allow_removal: bool = False,
) -> Policy:
    """Load a policy for a model.

    Args:
        source: The name of a policy, or the path of a file: an exported policy
            (``.safetensors``), level costs, or a table of measured plans (``.json``). With
            native weights of the default model: ``"rap"`` (the policy trained over the levels
            of all items, down to four bits), ``"rap-low-bits"`` (down to two),
            ``"rap-recall"`` (one for answers that need facts from far back in the prompt) and
            ``"knapsack"`` (the level costs of the model; without any it is the
            `uniform_policy`, and a warning says so). With ``weights="bf16"``: ``"rap-v0"``
            (the trained policy that removes blocks) and ``"frontier"`` (the packaged table of
            removals). Any other method of
            `rap_env.policies.registry.methods`, on the packaged scores of the default model.
            For any model: ``"dense"``. ``"package.module:name"`` names any `Method`, or any
            callable that makes a policy from the model's byte arithmetic.
        model: The model that is served, or its byte arithmetic. None is the default model
            with native weights; it is not loaded, as its facts are in the package.
        allow_removal: Whether ``"knapsack"`` may remove blocks whose cost is not known, where
            nothing else fits (`middle_first`).

    Raises:
        UnknownNameError: There is no policy of this name, and no such file.
        ArtifactError: The file is damaged, or of an incompatible model.
        PluginError: A policy of another package cannot be loaded or made.
    """
    memory = model if isinstance(model, MemoryModel) else MemoryModel(model or default_facts())
    name = os.fspath(source)
    order = tuple(middle_first(memory.facts.num_layers)) if allow_removal else ()
    try:
        policy = _make(name, memory, None)
    except ArtifactError as error:
        if name != "knapsack":
            raise
        log.warning(
            "%s Until then all caches are lowered alike, and then all weights, to four bits.", error
        )
        return uniform_policy(memory, order)
    if name == "knapsack" and not policy.order:
        policy.order = order
    return policy


def make_method(
    name: str,
    context: PruningContext,
    ladder_bytes: LadderBytes | None = None,
    seed: int = 0,
    workload: str | Mapping[str, Any] = "tight",
) -> Policy:
    """Make a policy for a comparison, on the scores and importance of a context.

    Args:
        name: As for `load_policy`.
        context: The model with its scorer; the importance that a method needs is measured or
            loaded.
        ladder_bytes: The ladder over which it chooses; None removes blocks only.
        seed: Seed of everything random in a method.
        workload: Requests that a method tunes on, see `Basis`.

    Raises:
        UnknownNameError: There is no such policy.
        ArtifactError: The context lacks an importance order or table that the method needs,
            or the policy is of another model.
        PluginError: The policy of another package cannot be loaded or made.
    """
    ladder_bytes = mask_bytes(context.memory) if ladder_bytes is None else ladder_bytes
    return _make(name, context.memory, Basis(context, ladder_bytes, seed, workload))


def _make(name: str, memory: MemoryModel, basis: Basis | None) -> Policy:
    """A method or a packaged policy by its name, that of a file, or one of another package."""
    if name in methods():
        return methods()[name](memory, basis)
    path = Path(name).expanduser()
    if path.is_file():
        return _reader_of(path)(path, memory)
    plugin = find_plugin("policy", name, policy_names(), _HINT)
    factory = plugin.load()
    if isinstance(factory, type) and issubclass(factory, Method):
        policy: Policy = plugin.make(basis or packaged_basis(memory))
    else:
        policy = as_policy(plugin.make(memory))
    policy.source_sha256 = plugin.source_sha256
    return policy


def check_policy(source: str | os.PathLike[str]) -> None:
    """Check that there is a policy of a name or path, without a model.

    Raises:
        UnknownNameError: There is no policy of this name, and no such file.
        ArtifactError: The file is damaged or no policy.
        PluginError: Several packages offer the policy.
    """
    name, path = os.fspath(source), Path(source).expanduser()
    if name in policy_names():
        return
    if path.is_file():
        _reader_of(path)
    else:
        find_plugin("policy", name, policy_names(), _HINT)


def _reader_of(path: Path) -> Reader:
    """What reads a file of policies.

    Raises:
        ArtifactError: The file is damaged, or of a kind that holds no policy.
    """
    kind = KIND if path.suffix == ".safetensors" else artifact_kind(path)
    if kind is None or kind not in readers():
        raise ArtifactError(
            f"{path} is {'damaged' if kind is None else f'of the kind {kind!r}'}, but the file of "
            f"a policy is one of {', '.join(sorted(readers()))}."
        )
    return readers()[kind]
