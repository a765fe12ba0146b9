"""A policy that chooses by the kind of text of the prompts, besides size and budget."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from rap_env.importance.kind_costs import KindCosts
from rap_env.importance.level_costs import LevelCosts
from rap_env.importance.text_kinds import Shares
from rap_env.plan import MaskOrPlan
from rap_env.policy import PlanPolicy
from rap_env.request import Request

BY_TEXT = "-by-text"
"""End of the name of a policy that chooses by text, after that of the same policy without."""

_CACHED_POLICIES = 4  # a knapsack takes some 2.5 MiB, and 16 ms to make again


class TextPolicy:
    """A policy for each mixture of kinds of text, made from the costs on that mixture.

    Without the text of a prompt it chooses for equal shares of all kinds. Threads may share it.

    Args:
        costs: Costs of levels by kind of text.
        make: Makes a policy from costs, such as a `KnapsackPolicy`.

    Attributes:
        text_kinds: Tells the kinds of a prompt, for `for_text`.
        lowers: As of the policies that `make` makes.
        order: As of the policy for equal shares.
    """

    def __init__(self, costs: KindCosts, make: Callable[[LevelCosts], PlanPolicy]) -> None:
        self.text_kinds = costs.kinds
        self._made = lru_cache(_CACHED_POLICIES)(lambda shares: make(costs.mean(shares)))
        general = self.for_text(())
        self.name = f"{general.name}{BY_TEXT}"
        self.lowers: bool = getattr(general, "lowers", False)
        self.order: tuple[int, ...] | None = getattr(general, "order", None)

    def for_text(self, shares: Shares) -> PlanPolicy:
        """The policy for text with some shares of the kinds; see `TextKinds.shares`."""
        return self._made(shares)

    def choose(self, request: Request) -> MaskOrPlan:
        """Return the plan for a request whose text is not known."""
        return self.for_text(()).choose(request)

    def delta_nll(self, plan: MaskOrPlan, seq_len_tokens: int | None = None) -> float | None:
        """Predicted rise in NLL of a plan on equal shares of all kinds, nats per token."""
        return predicted_rise(self.for_text(()), plan, seq_len_tokens)


def for_text(policy: PlanPolicy, shares: Shares) -> PlanPolicy:
    """The policy for text with some shares of its kinds; itself if it does not choose by text."""
    return policy.for_text(shares) if isinstance(policy, TextPolicy) else policy


def predicted_rise(
    policy: PlanPolicy, plan: MaskOrPlan, seq_len_tokens: int | None
) -> float | None:
    """Rise in NLL that a policy predicts for a plan, nats per token; None without a prediction."""
    predict = getattr(policy, "delta_nll", lambda *_: None)
    rise: float | None = predict(plan, seq_len_tokens)
    return rise
