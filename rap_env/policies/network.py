"""A trained policy over the levels of all items: its file, and its choices for live requests."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, ClassVar, Self

import numpy as np

from rap_env.errors import ArtifactError, InvalidRequestError, UnknownNameError
from rap_env.ladder.item_bytes import LadderBytes
from rap_env.ladder.items import Ladder
from rap_env.ladder.observation import ItemImportance, ItemObservationBuilder
from rap_env.memory import MemoryModel
from rap_env.model_facts import ModelFacts
from rap_env.plan import Plan
from rap_env.policies.base import Policy
from rap_env.policies.item_network import ItemNetwork, ItemNetworkWeights
from rap_env.policies.policy_file import (
    EXPORT_AGAIN,
    Arrays,
    ExportedPolicy,
    PolicyModel,
    part_of,
    weights_of,
    write_policy,
)
from rap_env.request import Request, whole_number

log = logging.getLogger(__name__)

_IMPORTANCE = "importance."
_CACHED_CHOICES = 1024

ScorePlans = Callable[[Sequence[Plan]], Sequence[float]]
"""Gives a number for each plan, lower is better: its delta_nll or its NLL."""


@dataclass(frozen=True, eq=False)
class LadderPolicyFile(ExportedPolicy):
    """A trained item-wise policy, with the importance of the items that it was exported for.

    Attributes:
        weights: Weights and settings of the network.
        importance: Importance of the levels of the model's items.
        ladder: `Ladder.spec` of the ladder that it was trained on.
        items: Names of the model's items with a lower level, and the levels of each.
        provenance: How the policy was trained: agent, seed, steps, versions.

    Raises:
        ArtifactError: The parts are of models with different items.
    """

    kind: ClassVar[str] = "exported ladder policy"

    weights: ItemNetworkWeights
    importance: ItemImportance
    ladder: dict[str, Any]
    items: dict[str, list[str]]
    model: PolicyModel
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        width = max(map(len, self.items.values()), default=0) + 1
        _check_importance(self.importance, (len(self.items), width), self.model.name)
        if self.weights.block_vectors and len(self.weights.vectors) != len(self.items):
            raise ArtifactError(
                f"The policy has vectors for {len(self.weights.vectors)} items, but "
                f"{self.model.name} has {len(self.items)}; {EXPORT_AGAIN}."
            )

    @classmethod
    def made(
        cls,
        weights: ItemNetworkWeights,
        importance: ItemImportance,
        ladder: Ladder,
        facts: ModelFacts,
        provenance: dict[str, Any],
    ) -> LadderPolicyFile:
        """The file of a policy for the items of a ladder."""
        items = {item.name: list(item.levels) for item in ladder.items}
        return cls(weights, importance, ladder.spec, items, PolicyModel.of(facts), provenance)

    def serves(self, facts: ModelFacts) -> bool:
        """Whether a model has the items and levels that the policy was exported for."""
        items = Ladder.of(facts, **self.ladder).items
        return {item.name: list(item.levels) for item in items} == self.items

    def builder_for(
        self, memory: MemoryModel, importance: ItemImportance | None = None
    ) -> ItemObservationBuilder:
        """What builds the policy's observations of a model.

        Args:
            memory: The model to serve. A warning is logged if its weights are not those that the
                policy was exported for.
            importance: Importance of the levels of its items; None takes the file's.

        Raises:
            ArtifactError: The policy cannot serve a model with these items, or `importance` is of
                other items.
        """
        own, facts = self.model, memory.facts
        ladder = Ladder.of(facts, **self.ladder)
        if self.weights.block_vectors and len(ladder) != len(self.items):
            raise ArtifactError(
                f"The policy for {own.name} has vectors for {len(self.items)} items, but "
                f"{facts.name} has {len(ladder)} items. Train a policy for this model."
            )
        if importance is not None:
            _check_importance(importance, (len(ladder), ladder.width), facts.name)
        elif not self.serves(facts):
            raise ArtifactError(
                f"The policy was exported for {own.name}, whose items have other levels than those "
                f"of {facts.name} as it is loaded ({facts.weights} weights): {len(self.items)} and "
                f"{len(ladder)} items. Load the model as it was, give what its items cost (kinds= "
                "or --kinds, made by `python -m experiments.levels '+kinds={...}'`; or features=), "
                "or export a policy for it."
            )
        elif facts.fingerprint != own.fingerprint:
            log.warning(
                "The policy was exported for %s (%s), and %s (%s) has other weights: it uses the "
                "importance of the former's items, so its plans may be worse.",
                own.name, own.dtype, facts.name, facts.dtype,
            )  # fmt: skip
        return ItemObservationBuilder(LadderBytes(memory, ladder), importance or self.importance)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the policy as a safetensors file with a checksum, and replace an existing file.

        Raises:
            StorageFullError: The disk is full; an existing file stays intact.
        """
        arrays = {
            f"{_IMPORTANCE}{entry.name}": np.asarray(
                getattr(self.importance, entry.name), np.float64
            )
            for entry in fields(self.importance)
        }
        write_policy(
            path, self.kind, self.weights, arrays, self.model, self.provenance,
            ladder=self.ladder, items=self.items,
        )  # fmt: skip

    @classmethod
    def of(cls, body: dict[str, Any], arrays: Arrays) -> Self:
        """The policy from the parts of a file."""
        return cls(
            weights_of(ItemNetworkWeights, body, arrays),
            ItemImportance(**part_of(arrays, _IMPORTANCE)),
            body["ladder"],
            body["items"],
            PolicyModel(**body["model"]),
            body["provenance"],
        )


class LadderPolicy(Policy):
    """A trained item-wise network, which lowers its best item until the request fits.

    If no plan fits, it lowers every item as far as possible. Threads may share a policy.

    Args:
        memory: The model's byte arithmetic.
        file: The exported policy.
        importance: Importance of the levels of the model's items; None takes the file's.
        best_of: Number of plans among which it chooses: the greedy one and samples.
        score: Scores plans, if `best_of` is above 1; the one with the lowest score is chosen.
        cached_choices: Requests whose plan is cached.

    Attributes:
        file: The exported policy.
        builder: Builds the network's observations.
        ladder: The items of the model.
        order: Blocks in the order of their removal, (2L,); None if the ladder does not remove all
            of them, or the policy was trained without an order over items.

    Raises:
        InvalidRequestError: `best_of` is no whole number of at least 1, or above 1 without `score`.
        ArtifactError: The policy cannot serve this model.
    """

    name = "rap"
    lowers = True

    def __init__(
        self,
        memory: MemoryModel,
        file: LadderPolicyFile,
        importance: ItemImportance | None = None,
        *,
        best_of: int = 1,
        score: ScorePlans | None = None,
        cached_choices: int = _CACHED_CHOICES,
    ) -> None:
        self._best_of = whole_number("best_of", best_of, least=1)
        if best_of > 1 and score is None:
            raise InvalidRequestError(f"best_of={best_of} needs a way to score plans; pass score.")
        self.memory = memory
        self.file = file
        self._score = score
        self.builder = builder = file.builder_for(memory, importance)
        self.ladder = builder.ladder
        self.order = _removal_order(self.ladder, builder.importance, memory.facts.num_blocks)
        self._reached = builder.importance.reached
        self._network = ItemNetwork(file.weights, builder)
        self._cached_choice = lru_cache(maxsize=cached_choices)(self._choose)

    def choose(self, request: Request) -> Plan:
        """Return the levels that the network chooses so that the request fits.

        Raises:
            InvalidRequestError: The model cannot serve the batch size or the length.
        """
        return self._cached_choice(request)

    def delta_nll(self, plan: Plan, seq_len_tokens: int | None = None) -> float | None:
        """Rise in NLL that the order over items predicts for a plan, nats per token.

        It is the sum of what the order's steps added when it was made, whatever the length of
        sequences; None if the policy has no order, or its ladder does not have the plan's levels.
        """
        try:
            positions = self.ladder.positions(plan)
        except UnknownNameError:
            return None
        rise = float(self._reached[np.arange(len(positions)), positions].sum())
        return rise if self._reached.any() else None

    def _choose(self, request: Request) -> Plan:
        if self._best_of == 1:
            return self._network.plan(request)
        plans = list(dict.fromkeys(self._network.sample(request, self._best_of)))
        if self._score is None or len(plans) == 1:
            return plans[0]
        scores = np.nan_to_num(np.asarray(self._score(plans), dtype=np.float64), nan=np.inf)
        return plans[int(np.argmin(scores))]


def _removal_order(
    ladder: Ladder, importance: ItemImportance, num_blocks: int
) -> tuple[int, ...] | None:
    """The blocks by the place of their removal in the order over items."""
    places = {
        2 * item.layer + (item.kind == "ffn"): importance.place[number, len(item.levels) - 1]
        for number, item in enumerate(ladder.items)
        if item.layer is not None and item.kind != "cache" and item.levels[-1] == "removed"
    }
    if len(places) < num_blocks or not importance.place.any():
        return None
    return tuple(sorted(places, key=places.__getitem__))


def _check_importance(importance: ItemImportance, shape: tuple[int, int], name: str) -> None:
    for entry in fields(importance):
        found = np.shape(getattr(importance, entry.name))
        if found != shape:
            raise ArtifactError(
                f"The importance of {name} must have {shape[0]} x {shape[1]} values of "
                f"{entry.name}, one for each level of an item, but its shape is {found}."
            )
