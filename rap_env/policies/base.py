"""The interface of everything that chooses plans: methods, trained policies, lookup tables."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol, runtime_checkable

from rap_env.errors import InvalidRequestError
from rap_env.importance.level_costs import LevelCosts
from rap_env.importance.plan_table import PlanTable
from rap_env.levels import WeightLevel
from rap_env.plan import Plan
from rap_env.request import Request


@runtime_checkable
class PolicyLike(Protocol):
    """The least that a policy of your own needs; `as_policy` makes a `Policy` of it.

    Attributes:
        name: Its name in records and tables.
    """

    name: str

    def choose(self, request: Request) -> Plan:
        """Return a plan for a request, as in `Policy`."""


class Policy(ABC):
    """Chooses the plan for a request.

    Only `name` and `choose` are needed. Every other member has a default, which means that
    the policy does not have this ability, or needs nothing.

    Attributes:
        name: Its name in records and tables.
        weight_levels: The packed levels of weights and embeddings that its plans may have;
            they are made at the start of a service.
        order: Blocks in the order in which they may be removed beyond its plans, by index;
            None if it has no such order.
        level_costs: The costs of levels from which it predicts; None without any.
        table: The measured plans that it looks up; None without any.
        evaluations: Passes over the calibration text that all choices so far needed, rounded
            up for each request. A stored score counts too: the number is what a server with
            an empty score store would have to run.
        setup_evaluations: Plans scored once, before the first request.
        table_sha256: Hash of the table of measured plans that it follows; None without one.
            Rows of an older table are not used again.
        source_sha256: Hash of the file that defines a policy of another package; None for
            ours. Rows of an older file are not used again.
    """

    name: str
    weight_levels: tuple[WeightLevel, ...] = ()
    order: tuple[int, ...] | None = None
    level_costs: LevelCosts | None = None
    table: PlanTable | None = None
    evaluations: int = 0
    setup_evaluations: int = 0
    table_sha256: str | None = None
    source_sha256: str | None = None

    @abstractmethod
    def choose(self, request: Request) -> Plan:
        """Return a plan for a request. It does not have to fit the budget.

        The call changes no model.

        Raises:
            InvalidRequestError: The model cannot serve the batch size or the length.
        """

    def delta_nll(self, plan: Plan, seq_len_tokens: int | None = None) -> float | None:
        """Predict the rise in NLL of a plan.

        Args:
            plan: The plan.
            seq_len_tokens: Length of sequences; None is the length of the calibration text.

        Returns:
            The rise in nats per token; None if the policy predicts nothing for the plan.
        """
        return None


class _Wrapped(Policy):
    """A user's object with only a name and `choose`."""

    def __init__(self, chooser: PolicyLike) -> None:
        self.name = chooser.name
        self._chooser = chooser

    def choose(self, request: Request) -> Plan:
        return self._chooser.choose(request)


def as_policy(chooser: PolicyLike) -> Policy:
    """A `Policy` as it is; any other object with a name and `choose`, wrapped in one.

    Raises:
        InvalidRequestError: It has no name, or no `choose`.
    """
    if isinstance(chooser, Policy):
        return chooser
    if isinstance(chooser, type) or not isinstance(chooser, PolicyLike):
        raise InvalidRequestError(
            f"A {type(chooser).__name__} is no policy: it needs a name and choose(request)."
        )
    return _Wrapped(chooser)
