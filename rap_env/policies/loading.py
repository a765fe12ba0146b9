"""Policies for live requests: the knapsack, the trained network, the frontier, orders, fixed masks.

No policy here runs a model or loads torch; its choice depends on the request alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from rap_env.artifacts import artifact_kind, load_artifact
from rap_env.costs import request_costs
from rap_env.errors import ArtifactError
from rap_env.importance.frontier import Frontier
from rap_env.importance.kind_costs import KindCosts
from rap_env.importance.level_costs import LevelCosts
from rap_env.importance.orders import greedy_order
from rap_env.importance.plan_frontier import PlanFrontier
from rap_env.ladder.item_bytes import LadderBytes
from rap_env.ladder.item_observation import ItemImportance
from rap_env.ladder.items import Ladder
from rap_env.memory import MemoryModel
from rap_env.model_facts import HasFacts, ModelFacts
from rap_env.observation import ImportanceFeatures, ObservationBuilder
from rap_env.plan import Plan
from rap_env.plugins import PluginError, find_plugin
from rap_env.policies.base import Policy, as_policy
from rap_env.policies.block_network import BlockNetwork
from rap_env.policies.by_text import TextPolicy
from rap_env.policies.knapsack import KnapsackPolicy
from rap_env.policies.network import LadderPolicy, LadderPolicyFile
from rap_env.policies.policy_file import PolicyFile, read_policy
from rap_env.request import Request

_Kind = TypeVar("_Kind")
_Costs = TypeVar("_Costs", LevelCosts, KindCosts)

SAVED = Path(__file__).parent / "packaged"
"""Folder of the policy files in the package, named after their model."""

DEFAULT_MODEL = "smollm2-135m"
"""The model of the packaged policies, frontier and level costs."""

NAMED = (
    "dense",
    "frontier",
    "knapsack",
    "knapsack-by-text",
    "rap",
    "rap-by-text",
    "rap-recall",
    "rap-v0",
)
"""Names that `load_policy` accepts."""

_FILES_OF = {
    "frontier": f"{DEFAULT_MODEL}.frontier.json",
    "rap": f"{DEFAULT_MODEL}.ladder.safetensors",
    "rap-by-text": f"{DEFAULT_MODEL}.ladder.safetensors",
    "rap-recall": f"{DEFAULT_MODEL}.recall.safetensors",
    "rap-v0": f"{DEFAULT_MODEL}.safetensors",
}

FACTS_VERSION = 2
"""Format of the facts of the default model in the package."""

KNAPSACKS = ("knapsack", "knapsack-by-text")
"""Policies from the level costs in the package; the server has a fallback for other models."""

_WITHOUT_FILE = ("dense", *KNAPSACKS)

_HINT = (
    "Any other value is read as the path of a file, or as package.module:factory, and there is no "
    "such file."
)
_CACHED_CHOICES = 1024
_FILES: tuple[type[PolicyFile | LadderPolicyFile], ...] = (PolicyFile, LadderPolicyFile)


def default_facts(weights: str = "native") -> ModelFacts:
    """Facts of the default model in bfloat16, as shipped with the package; needs no torch.

    Args:
        weights: The format of its weights, ``"native"`` or ``"bf16"``; see `rap_env.load_llm`.

    Raises:
        ArtifactError: The file is damaged.
    """
    path = SAVED / f"{DEFAULT_MODEL}.facts.json"
    body = load_artifact(path, "model facts", FACTS_VERSION)[weights]
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in body.items()}
    return ModelFacts(**fields)


class StaticPolicy(Policy):
    """The same mask or plan for every request."""

    def __init__(self, mask: Plan, name: str = "static") -> None:
        self.mask = mask
        self.name = name

    def choose(self, request: Request) -> Plan:
        """Return the mask or plan."""
        return self.mask


class OrderPolicy(Policy):
    """Removes blocks in a fixed order until the request fits; all of them if it never does.

    Raises:
        UnknownNameError: The order names a block that the model does not have.
    """

    name = "order"
    order: tuple[int, ...]

    def __init__(self, memory: MemoryModel, order: Iterable[int]) -> None:
        self.memory = memory
        self.order = tuple(order)
        Plan.removing(*self.order).check(memory.facts.num_blocks)

    def choose(self, request: Request) -> Plan:
        """Return the shortest prefix of the order that fits the budget."""
        costs = request_costs(self.memory, request.batch_size, request.seq_len_tokens)
        return costs.remove_until_fits(self.order, request.budget_bytes)


class FrontierPolicy(Policy):
    """Looks up the best known mask that fits, or the smallest known one if none does.

    Raises:
        ArtifactError: The frontier is of a model with another number of blocks.
    """

    name = "frontier"

    def __init__(self, memory: MemoryModel, frontier: Frontier) -> None:
        if frontier.num_blocks != memory.facts.num_blocks:
            raise ArtifactError(
                f"The frontier is of a model with {frontier.num_blocks} blocks, but "
                f"{memory.facts.name} has {memory.facts.num_blocks}; profile this model."
            )
        self.memory = memory
        self.frontier = frontier

    def choose(self, request: Request) -> Plan:
        """Return the empty mask if it fits, else the known mask of least delta_nll that does."""
        costs = request_costs(self.memory, request.batch_size, request.seq_len_tokens)
        if costs.dense_peak_bytes <= request.budget_bytes:
            return Plan()
        found = self.frontier.best(self.memory, request)
        if found is None:
            known = (mask for mask, _ in self.frontier.entries)
            found = min(known, key=lambda mask: costs.peak_bytes(mask.removed), default=Plan())
        return found


class PlanFrontierPolicy(Policy):
    """Looks up the best measured plan that fits, or the smallest known one if none does.

    Args:
        memory: The model's byte arithmetic.
        frontier: The measured plans.
        cached_choices: Requests whose plan is cached.
    """

    name = "frontier"

    def __init__(
        self, memory: MemoryModel, frontier: PlanFrontier, cached_choices: int = _CACHED_CHOICES
    ) -> None:
        ladder = Ladder.of(memory.facts)
        self._bytes = LadderBytes(memory, ladder)
        self._known = frontier.on(ladder)
        self._cached_choice = lru_cache(maxsize=cached_choices)(self._choose)

    def choose(self, request: Request) -> Plan:
        """Return the native plan if it fits, else the known plan of least delta_nll that does."""
        return self._cached_choice(request)

    def _choose(self, request: Request) -> Plan:
        costs = self._bytes.costs(request.batch_size, request.seq_len_tokens)
        if costs.dense_peak_bytes <= request.budget_bytes:
            return Plan()
        found = self._known.best(costs, request.budget_bytes)
        smallest = self._known.plans[int(np.argmin(self._known.peak_bytes(costs)))]
        return smallest if found is None else found


class NetworkPolicy(Policy):
    """A trained block-wise network, which removes its best block until the request fits.

    If no mask fits, it removes every block. Threads may share a policy.

    Args:
        memory: The model's byte arithmetic.
        file: The exported policy.
        features: Importance of the model's blocks; None takes the file's.
        cached_choices: Requests whose mask is cached.

    Attributes:
        order: The model's blocks in GSI order, length 2L; empty where no importance is known.
        file: The exported policy.
    """

    name = "rap-v0"

    def __init__(
        self,
        memory: MemoryModel,
        file: PolicyFile,
        features: ImportanceFeatures | None = None,
        cached_choices: int = _CACHED_CHOICES,
    ) -> None:
        seen, self.order = file.features_for(memory.facts, features)
        self.memory = memory
        self.file = file
        self._network = BlockNetwork(file.weights, ObservationBuilder(memory, seen))
        self._cached_choice = lru_cache(maxsize=cached_choices)(self._choose)

    def choose(self, request: Request) -> Plan:
        """Return the blocks that the network removes until the request fits."""
        return self._cached_choice(request)

    def _choose(self, request: Request) -> Plan:
        return Plan(frozenset(self._network.removals(request)))


def load_policy(
    source: str | os.PathLike[str],
    model: HasFacts | MemoryModel,
    *,
    features: ImportanceFeatures | ItemImportance | None = None,
    kinds: KindCosts | None = None,
) -> Policy:
    """Load a policy for a live model.

    Args:
        source: One of these names of policies for the default model, or the path of an exported
            policy of either kind (``.safetensors``), of level costs, of such costs by kind of text
            (`KindCosts`), or of a table of masks or plans that ``experiments.profile`` wrote
            (``.json``). With native weights: ``"rap"`` (the trained policy over the levels of all
            items), ``"rap-recall"`` (one for answers that need facts from far back in the prompt)
            and ``"knapsack"`` (the packaged level costs); ``"rap-by-text"`` and
            ``"knapsack-by-text"`` choose by the kinds of text of the prompts. With
            ``weights="bf16"``: ``"rap-v0"`` (the trained policy that removes blocks) and
            ``"frontier"`` (the packaged table of masks). For any model: ``"dense"``. Other packages
            may offer further names (entry points ``rap_env.policies``);
            ``"package.module:factory"`` names any callable that makes a policy from the model's
            byte arithmetic.
        model: The model that is served, or its byte arithmetic.
        features: Importance of its blocks, or of the items of its ladder, for a network; None
            takes the file's.
        kinds: Costs by kind of text, for a network over levels: it then observes, instead of
            `features`, the importance of items for the kinds of text of each prompt
            (`TextPolicy`).

    Raises:
        UnknownNameError: There is no policy of this name, and no such file.
        ArtifactError: The file is damaged, or of an incompatible model; or `kinds` are given for
            another policy.
        PluginError: A policy of another package cannot be loaded or made.
    """
    memory = model if isinstance(model, MemoryModel) else MemoryModel(model)
    path = None if source in _WITHOUT_FILE else _path_of(source)
    if kinds is not None and (path is None or path.suffix == ".json"):
        raise ArtifactError(
            f"Costs by kind of text were given for the policy {os.fspath(source)}, but only a "
            "trained policy over levels, such as rap, observes them; the file of such costs is "
            "itself a policy, a knapsack."
        )
    if source == "dense":
        return StaticPolicy(Plan(), "dense")
    if source == "knapsack":
        return KnapsackPolicy(memory, _packaged_costs(LevelCosts, "levels", memory))
    if source == "knapsack-by-text":
        return TextPolicy(packaged_kinds(memory), partial(KnapsackPolicy, memory))
    if source == "rap-by-text" and kinds is None:
        kinds = packaged_kinds(memory)
    if path is None:
        return _policy_of_package(os.fspath(source), memory)
    if path.suffix == ".json":
        if artifact_kind(path) == LevelCosts.KIND:
            return KnapsackPolicy(memory, LevelCosts.load(path, memory))
        if artifact_kind(path) == KindCosts.KIND:
            return TextPolicy(KindCosts.load(path, memory), partial(KnapsackPolicy, memory))
        if artifact_kind(path) == PlanFrontier.KIND:
            return PlanFrontierPolicy(memory, PlanFrontier.load(path, memory))
        return FrontierPolicy(memory, Frontier.load(path, memory))
    file = read_policy(path, *_FILES)
    if isinstance(file, LadderPolicyFile):
        importance = _of_kind(features, ItemImportance)
        if source in _FILES_OF and importance is None:
            _check_packaged(str(source), file, memory)
        if kinds is not None:
            return TextPolicy(kinds, partial(_ladder_policy, memory, file))
        policy = LadderPolicy(memory, file, importance)
        if source in _FILES_OF:
            policy.name = str(source)
        return policy
    if kinds is not None:
        raise ArtifactError(
            f"The policy {os.fspath(source)} removes blocks, whose importance is one for all kinds "
            "of text; give kinds to a policy over levels, such as rap."
        )
    return NetworkPolicy(memory, file, _of_kind(features, ImportanceFeatures))


def _ladder_policy(memory: MemoryModel, file: LadderPolicyFile, costs: LevelCosts) -> LadderPolicy:
    """A network that observes the importance of items by costs, in the order that they give."""
    item_bytes = LadderBytes(memory, Ladder.of(memory.facts, **file.ladder))
    return LadderPolicy(memory, file, greedy_order(costs, item_bytes).importance)


def policy_blocks(source: str | os.PathLike[str]) -> int | None:
    """Number of blocks of the model that a policy is for, without that model.

    Args:
        source: As for `load_policy`.

    Returns:
        The number; None for a policy of any model, of another package, or in a table.

    Raises:
        UnknownNameError: There is no policy of this name, and no such file.
        ArtifactError: The file is damaged or no policy.
        PluginError: Several packages offer the policy.
    """
    if source in _WITHOUT_FILE:
        return None
    path = _path_of(source)
    if path is None:
        find_plugin("policy", os.fspath(source), NAMED, _HINT)
        return None
    if path.suffix != ".json":
        return read_policy(path, *_FILES).model.num_blocks
    kinds = {kind.KIND for kind in (LevelCosts, KindCosts, PlanFrontier, Frontier)}
    if (kind := artifact_kind(path)) not in kinds:
        raise ArtifactError(
            f"{path} is {'damaged' if kind is None else f'of the kind {kind!r}'}, but a policy in "
            f"a JSON file is one of {', '.join(sorted(kinds))}."
        )
    return None


def _of_kind(features: object, kind: type[_Kind]) -> _Kind | None:
    """Importance for one kind of policy.

    Raises:
        ArtifactError: It is of the other kind.
    """
    if features is None or isinstance(features, kind):
        return features
    raise ArtifactError(
        f"This policy observes importance as {kind.__name__}, not as {type(features).__name__}; "
        "leave features out to take those in its file, or give importance of that kind."
    )


def _check_packaged(name: str, file: LadderPolicyFile, memory: MemoryModel) -> None:
    """Check that a model has the items of a packaged policy over levels.

    Raises:
        ArtifactError: It is another model, or the default one with weights of another format.
    """
    own, facts = file.model, memory.facts
    if not file.serves(facts):
        raise ArtifactError(
            f'The packaged policy "{name}" is of {own.name} with native weights, but {facts.name} '
            f"is loaded with {facts.weights} weights, so its items have other levels. Load "
            f'{own.name} with weights="native", or use the packaged policy "rap-v0", which removes '
            "blocks only."
        )


def packaged_kinds(memory: MemoryModel) -> KindCosts:
    """The costs of levels by kind of text of the default model.

    Raises:
        ArtifactError: The model is another one, or the package lacks the file.
    """
    return _packaged_costs(KindCosts, "kinds", memory)


def _packaged_costs(costs: type[_Costs], name: str, memory: MemoryModel) -> _Costs:
    """Costs of levels of the default model; errors are those of `packaged_kinds`."""
    try:
        return costs.load(SAVED / f"{DEFAULT_MODEL}.{name}.json", memory)
    except (FileNotFoundError, ArtifactError) as error:
        raise ArtifactError(
            f"The package has no level costs of {memory.facts.name} as it is loaded "
            f"({memory.facts.weights} weights, {memory.facts.dtype}); measure them in a checkout "
            f"with `python -m experiments.levels model.name={memory.facts.name}`, and give the "
            f"path of the levels.json that it writes as the policy. {error}"
        ) from None


def _path_of(source: str | os.PathLike[str]) -> Path | None:
    """The file of a packaged name or of a path; None if there is none."""
    if source in _FILES_OF:
        return SAVED / _FILES_OF[os.fspath(source)]
    path = Path(source).expanduser()
    return path if path.is_file() else None


def _policy_of_package(name: str, memory: MemoryModel) -> Policy:
    """The policy that another package makes for a model."""
    plugin = find_plugin("policy", name, NAMED, _HINT)
    made = plugin.make(memory)
    try:
        return as_policy(made)
    except TypeError:
        raise PluginError(
            f"{plugin} makes a {type(made).__name__}, which is no policy: it needs a name and "
            "choose(request)."
        ) from None
