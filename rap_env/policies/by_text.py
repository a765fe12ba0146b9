"""The knapsack by the kind of text of the prompts, besides size and budget."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

from rap_env.importance.level_costs import LevelCosts
from rap_env.importance.text_kinds import KindCosts, Shares, TextKinds
from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.policies.base import Policy
from rap_env.policies.knapsack import KnapsackPolicy
from rap_env.policies.packaged_files import packaged_costs
from rap_env.policies.registry import packaged, reads
from rap_env.request import Request

BY_TEXT = "-by-text"
"""End of the name of a policy that chooses by text, after that of the same policy without."""

_CACHED_POLICIES = 4  # a knapsack takes some 2.5 MiB, and 16 ms to make again


class TextPolicy(Policy):
    """A policy for each mixture of kinds of text, made from the costs on that mixture.

    Without the text of a prompt it chooses for equal shares of all kinds. Threads may share it.

    Args:
        costs: Costs of levels by kind of text.
        make: Makes a policy from costs, such as a `KnapsackPolicy`.
    """

    text_kinds: TextKinds

    def __init__(self, costs: KindCosts, make: Callable[[LevelCosts], Policy]) -> None:
        self.text_kinds = costs.kinds
        self._made = lru_cache(_CACHED_POLICIES)(lambda shares: make(costs.mean(shares)))
        general = self.for_text(())
        self.name = f"{general.name}{BY_TEXT}"
        self.weight_levels = general.weight_levels
        self.order = general.order

    def for_text(self, shares: Shares) -> Policy:
        """The policy for text with some shares of the kinds; see `TextKinds.shares`."""
        return self._made(shares)

    def choose(self, request: Request) -> Plan:
        """Return the plan for a request whose text is not known."""
        return self.for_text(()).choose(request)

    def delta_nll(self, plan: Plan, seq_len_tokens: int | None = None) -> float | None:
        """Predicted rise in NLL of a plan on equal shares of all kinds, nats per token."""
        return self.for_text(()).delta_nll(plan, seq_len_tokens)


@packaged("knapsack-by-text")
def _packaged_knapsack(memory: MemoryModel) -> Policy:
    return TextPolicy(packaged_costs(KindCosts, memory), partial(KnapsackPolicy, memory))


@reads(KindCosts.KIND)
def _read_knapsack(path: Path, memory: MemoryModel) -> Policy:
    return TextPolicy(KindCosts.load(path, memory), partial(KnapsackPolicy, memory))
