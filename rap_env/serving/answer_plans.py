"""What the answers to a request say of the plans that computed them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from typing import Any

from rap_env.plan import Plan


class AnswerPlans:
    """The plans that computed the answers to one request, in the order of their passes.

    What is reported describes one of them: the plan with the largest predicted rise in NLL. A plan
    without a prediction counts as larger than any other, and of equal ones the last is reported.

    Args:
        predict: Gives the rise in NLL of a plan in nats per token, None without a prediction.
        server: Names what else determines the answers, such as the model's weights.

    Attributes:
        fingerprint: The API's ``system_fingerprint``: equal for equal `server` and equal plans.
        changed: Whether the plan changed from one pass to the next.
    """

    def __init__(self, predict: Callable[[Plan], float | None], server: str) -> None:
        self._predict = predict
        self._digest = server
        self._last: Plan | None = None
        self._reported = Plan()
        self._delta_nll: float | None = 0.0
        self.fingerprint = ""
        self.changed = False

    def add(self, plan: Plan) -> None:
        """Add the plan of the next pass."""
        if plan == self._last:
            return
        rise = self._predict(plan)
        if self._last is None or _order(rise) >= _order(self._delta_nll):
            self._reported, self._delta_nll = plan, rise
        self.changed = self._last is not None
        self._last = plan
        self._digest = hashlib.sha256(f"{self._digest} {plan.digest}".encode()).hexdigest()
        self.fingerprint = f"fp_{self._digest[:10]}"

    def report(self) -> dict[str, Any]:
        """The object ``rap`` of a response; ``delta_nll`` is in nats per token."""
        return {
            "plan": self._reported.digest,
            "levels": self._reported.summary,
            "delta_nll": self._delta_nll,
            "plan_changed": self.changed,
        }

    def headers(self) -> dict[str, str]:
        """The report as response headers; what is null there has no header."""
        return {
            f"x-rap-{name.replace('_', '-')}": value
            if isinstance(value, str)
            else json.dumps(value)
            for name, value in self.report().items()
            if value is not None
        }


def _order(rise: float | None) -> float:
    return math.inf if rise is None else rise
