"""The packaged policy over masks, on a base whose caches are stored in fewer bits."""

from __future__ import annotations

from collections.abc import Iterable

from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.policies.base import Policy
from rap_env.policies.method import Basis
from rap_env.policies.network_policy import NetworkPolicy, PolicyFile, packaged_network
from rap_env.policies.registry import makes
from rap_env.request import Request

_NAME = "rap-v0"


class MasksOnLoweredCaches(Policy):
    """A policy over masks on lowered caches, whose bytes it sees.

    Where the request does not fit even with every block removed, the caches are at the next level.

    Args:
        memory: The model's byte arithmetic.
        file: The exported policy.
        levels: Levels of all caches, from the most to the least exact one.

    Raises:
        ArtifactError: The policy is not for a model of this shape.
    """

    name = _NAME

    def __init__(self, memory: MemoryModel, file: PolicyFile, levels: Iterable[str]) -> None:
        self.memory = memory
        bases = [Plan.uniform(memory.facts.num_layers, caches=level) for level in levels]
        self._policies = [(NetworkPolicy(memory, file, base=base), base) for base in bases]

    def choose(self, request: Request) -> Plan:
        """Return the native plan if it fits, else lowered caches without some blocks."""
        if self.memory.peak_bytes(Plan(), request) <= request.budget_bytes:
            return Plan()
        fitting = (pair for pair in self._policies if pair[0].can_fit(request))
        policy, base = next(fitting, self._policies[-1])
        return base.without(*policy.choose(request).removed)


@makes(_NAME)
def _packaged_masks(memory: MemoryModel, basis: Basis | None) -> Policy:
    """On caches at int8, else at int4, if they have these levels in a comparison."""
    file = packaged_network("blocks")
    levels = () if basis is None else basis.ladder_bytes.ladder.cache_levels
    lowered = [level for level in ("int8", "int4") if level in levels]
    if lowered:
        return MasksOnLoweredCaches(memory, file, lowered)
    return NetworkPolicy(memory, file, name=_NAME)
