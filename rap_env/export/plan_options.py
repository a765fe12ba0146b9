"""The plan that a user exports: given, or chosen for a request. Without torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rap_env.errors import ArtifactError, InvalidRequestError
from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.policies.base import Policy
from rap_env.policies.loading import StaticPolicy, load_policy
from rap_env.policies.packaged_files import find_delta_nll
from rap_env.request import Request, parse_bytes

DEFAULT_POLICY = "rap-v0"
"""The policy that chooses for folders."""


@dataclass(frozen=True)
class ChosenPlan:
    """A plan to export, and what is known of it.

    Attributes:
        plan: The plan.
        rise: Its predicted rise in NLL, nats per token, or None.
        source: Where that is from, or why it is not known.
    """

    plan: Plan
    rise: float | None
    source: str


@dataclass(frozen=True)
class PlanOptions:
    """What the options of a command say of a plan: itself, or a request to choose it for.

    Exactly one of `plan` and `request` is given. Without a policy, the engine's own chooses.
    """

    plan: Plan | None
    request: Request | None
    policy: str | None

    @classmethod
    def of(
        cls,
        remove: Sequence[str],
        plan_file: Path | None,
        shape: tuple[int | None, int | None, str | None],
        policy: str | None,
    ) -> PlanOptions:
        """Parse the values of the options.

        Args:
            remove: Values of ``--remove``.
            plan_file: Value of ``--plan``.
            shape: Values of ``--batch``, ``--seq`` and ``--budget``.
            policy: Value of ``--policy``.

        Raises:
            InvalidRequestError: There is no plan, or several.
        """
        names = [name.strip() for text in remove for name in text.split(",") if name.strip()]
        batch, seq, budget = shape
        request = None
        if batch is not None and seq is not None and budget is not None:
            request = Request(batch, seq, parse_bytes("--budget", budget))
        given = [bool(names), plan_file is not None, shape != (None, None, None)]
        if sum(given) != 1 or (given[-1] and request is None):
            raise InvalidRequestError(
                "Give either --remove, or --plan, or all of --batch, --seq and --budget."
            )
        if request is not None:
            return cls(None, request, policy)
        plan = read_plan(plan_file) if plan_file else Plan.removing(*names)
        return cls(plan, None, policy)

    def choose(self, memory: MemoryModel, default: Policy | None = None) -> ChosenPlan:
        """The plan for a model.

        Args:
            memory: The byte arithmetic of the model.
            default: Chooses if no policy is named; None for `DEFAULT_POLICY`.

        Raises:
            InfeasibleBudgetError: It does not fit the request.
            UnknownNameError: The model does not have an item, or there is no such policy.
        """
        if self.request is None:
            assert self.plan is not None
            plan, seq = self.plan.check(memory.facts.num_blocks), None
            policy: Policy = StaticPolicy(plan)
        else:
            rule = default if self.policy is None else None
            policy = rule or load_policy(self.policy or DEFAULT_POLICY, memory)
            plan, seq = policy.choose(self.request), self.request.seq_len_tokens
            memory.check_fits(plan, self.request)
        return ChosenPlan(plan, *find_delta_nll(memory, policy, plan, seq))


def read_plan(path: Path) -> Plan:
    """Read a plan from a file.

    The file holds what `Plan.to_json` gives (an object of items and levels), or what
    ``rap choose --json`` prints, whose entry ``levels`` is such an object.

    Raises:
        ArtifactError: There is no such file, or it holds no plan.
        UnknownNameError: It names an item or a level that does not exist.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"Cannot read a plan from {path}: {error}.") from None
    try:
        answer = json.loads(text)
        if isinstance(answer, dict) and isinstance(answer.get("levels"), dict):
            text = json.dumps(answer["levels"])
        return Plan.from_json(text)
    except (ArtifactError, ValueError) as error:
        raise ArtifactError(
            f"{path} holds no plan ({error}); write it with `rap choose ... --json`, or as a JSON "
            'object such as {"layer03.ffn": "removed"}.'
        ) from None
