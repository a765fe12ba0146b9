"""The interface of policies, and a user's own object in its place."""

from __future__ import annotations

import pytest

from rap_env.plan import Plan
from rap_env.policies.base import Policy, as_policy
from rap_env.request import Request

REQUEST = Request(1, 16, 10**6)


class OnlyChooses:
    """What a user writes: a name and `choose`, and members that no policy has."""

    name = "own"
    order = (3, 1)

    def choose(self, request):
        return Plan.of({"layer00.ffn": "removed"})


class Chooses(OnlyChooses, Policy):
    """The same as a `Policy`, whose optional members count."""


def test_an_object_that_only_chooses_has_no_optional_member():
    policy = as_policy(OnlyChooses())
    plan = policy.choose(REQUEST)
    assert (policy.name, plan.removed_names) == ("own", ("layer00.ffn",))
    assert (policy.lowers, policy.order, policy.text_kinds) == (False, None, None)
    assert policy.delta_nll(plan, 16) is None
    assert policy.for_text((1.0,)) is policy


def test_a_policy_is_taken_as_it_is():
    policy = Chooses()
    assert as_policy(policy) is policy
    assert policy.order == (3, 1)


@pytest.mark.parametrize("wrong", [3, "rap", Chooses, None])
def test_what_cannot_choose_is_no_policy(wrong):
    with pytest.raises(TypeError, match="is no policy: it needs a name and choose"):
        as_policy(wrong)
