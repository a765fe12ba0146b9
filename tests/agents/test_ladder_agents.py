"""Agents on `RAPLadder-v0`: training, resuming, imitation, and plans for requests."""

from dataclasses import replace

import numpy as np
import pytest

from agents.imitation import Demonstration, ImitationConfig, imitate
from agents.trained_policy import TrainedPolicy
from agents.training import train
from rap_env.context.base import item_order
from rap_env.errors import ArtifactError
from rap_env.policies.knapsack import KnapsackPolicy
from tests.agents.ladders import SPEC, LadderContext, encoder_of, feasible, make_envs, requests_of
from tests.agents.policies import untrained
from tests.agents.synthetic import ONE_OF_EACH_KIND
from tests.agents.test_training import short

QUICK = ImitationConfig(updates=200, batch_size=64)


@pytest.fixture
def context():
    return LadderContext()


@pytest.fixture
def builder(context):
    return encoder_of(context)


def test_resuming_with_another_ladder_is_rejected(tmp_path, context):
    train(short(steps=32), make_envs(context), tmp_path, progress=False)
    other = {**SPEC, "together": []}
    with pytest.raises(ArtifactError, match="ladder=.*'int8', 'int4'.* cannot resume with ladder="):
        train(short(), make_envs(context, other), tmp_path, progress=False)


def demonstrations(context, builder, teacher):
    """A teacher's plans for requests whose budgets are met by all of their steps."""
    asked = feasible(builder, requests_of(context))
    plans = [(request, teacher(builder, context, request)) for request in asked]
    return [
        Demonstration(replace(r, budget_bytes=context.memory.peak_bytes(plan, r)), plan)
        for r, plan in plans
        if plan
    ]


def greedy(builder, context, request):
    """The greedy order over items, which observations show."""
    steps = item_order(context, builder.ladder_bytes).steps
    costs = builder.ladder_bytes.costs(request.batch_size, request.seq_len_tokens)
    return costs.lower_until_fits(steps, request.budget_bytes)


def knapsack(builder, context, request):
    return KnapsackPolicy(context.memory, context.costs).choose(request)


@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_the_policy_reaches_the_plans_of_its_teacher(context, builder, name):
    shown = demonstrations(context, builder, greedy)[::4]
    model = untrained(name, context, block_vectors=8)
    result = imitate(model, shown, builder, QUICK, progress=False)
    assert result.agreement > 0.97
    policy = TrainedPolicy(model.policy, builder)
    assert [policy.choose(one.request) for one in shown] == [one.plan for one in shown]


@pytest.mark.slow
def test_a_teacher_whose_plans_the_ladder_cannot_reach_is_followed_as_far_as_possible(
    context, builder
):
    """The knapsack lowers single caches to int8, which the ladder lowers together."""
    shown = demonstrations(context, builder, knapsack)
    apart = [one for one in shown if len(set(builder.ladder.positions(one.plan)[6:9])) > 1]
    assert apart
    model = untrained("maskable_ppo", context, block_vectors=8)
    assert imitate(model, shown, builder, QUICK, progress=False).agreement > 0.9
    policy = TrainedPolicy(model.policy, builder)
    losses = [context.scorer.loss(policy.choose(one.request)) for one in shown]
    teacher = [context.scorer.loss(one.plan) for one in shown]
    assert np.mean(losses) < 1.5 * np.mean(teacher)
