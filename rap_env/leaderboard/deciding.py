"""How policies of any kind decide: methods by name or class, functions, agents."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from rap_env.errors import InvalidRequestError
from rap_env.plan import Plan
from rap_env.policies.loading import make_method
from rap_env.policies.method import Basis, Method
from rap_env.request import Request

Decision = tuple[Plan, bool]
"""A plan, and whether invalid actions ended the episode before it fitted."""


@runtime_checkable
class _Chooser(Protocol):
    """What chooses a plan for a request, such as a `rap_env.policies.base.Policy`."""

    def choose(self, request: Request) -> Any: ...


@runtime_checkable
class _Predictor(Protocol):
    """A model of stable-baselines3."""

    predict: Callable[..., Any]


def made(policy: Any, basis: Basis) -> Any:
    """The policy; a method that is given by its name or class is made from a basis."""
    if isinstance(policy, str):
        return make_method(policy, *basis)
    return policy(basis) if isinstance(policy, type) and issubclass(policy, Method) else policy


def decider(
    policy: Any, seen: Callable[[Any], Any] = lambda observation: observation
) -> Callable[[Any, Request, int], Decision]:
    """What gives the decision of a policy for a request in an environment, with a seed.

    Each decision of an agent after the first one for a request has random actions.

    Args:
        policy: The policy.
        seen: Makes of an observation what the policy sees.
    """
    if isinstance(policy, _Chooser):

        def chosen(_env: Any, request: Request, _seed: int) -> Decision:
            plan = policy.choose(request)
            if not isinstance(plan, Plan):
                raise InvalidRequestError(
                    "choose(request) must return a rap_env.Plan, such as "
                    f"Plan.of({{'layer03.ffn': 'removed'}}), not {plan!r}."
                )
            return plan, False

        return chosen
    act = policy
    if isinstance(policy, _Predictor):
        masked = "action_masks" in inspect.signature(policy.predict).parameters

        def act(observation: Mapping[str, Any]) -> Any:
            masks = {"action_masks": observation["action_mask"].astype(bool)} if masked else {}
            return policy.predict(observation, deterministic=first, **masks)[0]

    elif not callable(policy):
        raise InvalidRequestError(
            "A policy is an object with choose(request), a stable-baselines3 model, or a function "
            f"from an observation to an action, not {policy!r}."
        )

    first, last_request = True, None

    def played(env: Any, request: Request, seed: int) -> Decision:
        nonlocal first, last_request
        first, last_request = request != last_request, request
        observation, _ = env.reset(seed=seed, options={"request": request})
        terminated = truncated = False
        while not (terminated or truncated):
            observation, _, terminated, truncated, _ = env.step(act(seen(observation)))
        return env.unwrapped.plan, truncated  # tasks limit no steps

    return played
