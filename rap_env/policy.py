"""The interface of everything that chooses masks or plans: baselines, policies, lookup tables."""

from __future__ import annotations

from typing import Protocol

from rap_env.plan import MaskOrPlan
from rap_env.request import Request


class PlanPolicy(Protocol):
    """Chooses the mask or plan for a request.

    Attributes:
        name: The policy's name in records and tables. A policy that lowers weights that it keeps
            also has an attribute `lowers`, which is true. A policy that predicts what its plans
            cost has a method ``delta_nll(plan, seq_len_tokens)``: the rise in NLL in nats per
            token, or None where it has no prediction.
    """

    name: str

    def choose(self, request: Request) -> MaskOrPlan:
        """Return a mask or plan for a request. It does not have to fit the budget.

        The call changes no model.

        Raises:
            InvalidRequestError: The model cannot serve the batch size or the length.
        """
