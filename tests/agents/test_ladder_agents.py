"""Agents on `RAPLadder-v0`: training, resuming, imitation, and plans for requests."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from agents.algorithms import ALGORITHMS, AgentConfig, make_model
from agents.imitation import Demonstration, ImitationConfig, Lesson, imitate
from agents.trained_policy import TrainedPolicy
from agents.training import make_vector_env, train
from rap_env.context.base import item_order
from rap_env.errors import ArtifactError, InfeasibleBudgetError
from rap_env.plan import Plan
from rap_env.policies.knapsack import KnapsackPolicy
from rap_env.request import Request
from tests.agents.ladders import (
    SPEC,
    LadderContext,
    encoder_of,
    feasible,
    make_envs,
    requests_of,
)
from tests.agents.synthetic import ONE_OF_EACH_KIND, SyntheticContext
from tests.agents.test_training import SHORT, Interrupt, assert_same, everything_of, stop_at

QUICK = ImitationConfig(updates=200, batch_size=64)


@pytest.fixture
def context():
    return LadderContext()


@pytest.fixture
def builder(context):
    return encoder_of(context)


def short(name="maskable_ppo", steps=256, **settings):
    given = {"n_envs": 2, "hyperparameters": SHORT[name], **settings}
    return AgentConfig(name, total_timesteps=steps, **given)


def model_of(name, context, spread=None, policy="blockwise", **settings):
    torch.manual_seed(0)
    config = AgentConfig(name, policy, n_envs=2, policy_settings=settings)
    model = make_model(config, make_vector_env(config, make_envs(context)))
    if spread:
        for parameter in model.policy.parameters():
            torch.nn.init.normal_(parameter, std=spread)
    return model


def fits(context, plan, request):
    return context.memory.peak_bytes(plan, request) <= request.budget_bytes


@pytest.mark.parametrize("policy", ["blockwise", "mlp"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_feasible_budget_is_met_at_the_first_plan_that_fits(context, builder, name, policy):
    trained = TrainedPolicy(model_of(name, context, 0.3, policy).policy, builder)
    plans = set()
    for request in feasible(builder, requests_of(context)):
        plan = trained.choose(request)
        assert fits(context, plan, request)
        assert trained.choose(request) == plan
        plans.add(plan)
    assert len(plans) > 5
    assert trained.lowers
    assert not trained.evaluations


@pytest.mark.parametrize("name", ["maskable_ppo", "masked_dqn"])
def test_it_lowers_the_item_with_the_highest_network_score(context, builder, name):
    trained = TrainedPolicy(model_of(name, context, 0.3).policy, builder)
    request, plan = Request.at_fraction(context.memory, 2, 500, 0.5), Plan()
    while not fits(context, plan, request):
        observation = builder.build(request, plan)
        given = {"action_masks": observation["action_mask"]} if name == "maskable_ppo" else {}
        action, _ = trained._policy.predict(observation, deterministic=True, **given)
        plan = builder.ladder.lower(plan, int(action))
    assert trained.choose(request) == plan


def test_best_of_takes_the_plan_with_the_lowest_score(context, builder):
    policy = model_of("ppo", context, 0.1).policy
    trained = TrainedPolicy(policy, builder, best_of=16, scorer=context.scorer)
    request = Request.at_fraction(context.memory, 2, 500, 0.5)
    plans = list(dict.fromkeys(trained.sample(request, 16)))
    assert 3 < len(plans) <= 16
    assert all(fits(context, plan, request) for plan in plans)
    chosen = trained.choose(request)
    assert trained.evaluations == len(plans)
    assert context.scorer.loss(chosen) == min(map(context.scorer.loss, plans))
    predicted = TrainedPolicy(policy, builder, best_of=16, score_masks=context.scorer.nll_many)
    assert predicted.choose(request) == chosen
    assert predicted.evaluations == 0


def test_an_infeasible_budget_is_rejected(context, builder):
    trained = TrainedPolicy(model_of("dqn", context).policy, builder)
    with pytest.raises(InfeasibleBudgetError, match="No levels of made in this ladder fit 100 b"):
        trained.choose(Request(1, 10, 100))


@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, context, name, monkeypatch):
    often = replace(ALGORITHMS[name], checkpoint_steps=min(40, ALGORITHMS[name].checkpoint_steps))
    monkeypatch.setitem(ALGORITHMS, name, often)
    config = short(name)
    train(config, make_envs(context), tmp_path / "whole", progress=False)
    with pytest.raises(Interrupt):
        train(config, make_envs(context), tmp_path / "cut", log_fns=[stop_at(150)], progress=False)
    result = train(config, make_envs(context), tmp_path / "cut", progress=False)
    assert 0 < result.resumed_from < config.total_timesteps
    assert_same(everything_of(tmp_path / "whole"), everything_of(tmp_path / "cut"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo", "dqn"])
def test_metrics_count_invalid_actions_also_after_a_resume(tmp_path, context, name):
    lines = []
    for steps in (200, 400):
        train(
            short(name, steps), make_envs(context, max_invalid_actions=4), tmp_path,
            log_fns=[lambda metrics, _: lines.append(metrics)], progress=False,
        )  # fmt: skip
    episodes = [metrics for metrics in lines if "episode/return" in metrics]
    fitting = [metrics for metrics in episodes if metrics["episode/fits"]]
    assert len(fitting) > 3
    for metrics in fitting:  # return = -loss - 0.1 for each invalid action
        expected = -metrics["episode/loss"] - 0.1 * metrics["episode/invalid_actions"]
        assert metrics["episode/return"] == pytest.approx(expected, abs=1e-4)
    truncated = [metrics for metrics in episodes if not metrics["episode/fits"]]
    assert all(metrics["episode/invalid_actions"] == 4 for metrics in truncated)
    assert any(metrics["episode/invalid_actions"] for metrics in episodes)


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
    steps = item_order(context, builder.item_bytes).steps
    costs = builder.item_bytes.costs(request.batch_size, request.seq_len_tokens)
    return costs.lower_until_fits(steps, request.budget_bytes)


def knapsack(builder, context, request):
    return KnapsackPolicy(context.memory, context.costs).choose(request)


@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_the_policy_reaches_the_plans_of_its_teacher(context, builder, name):
    shown = demonstrations(context, builder, greedy)[::4]
    model = model_of(name, context, block_vectors=8)
    result = imitate(model, [Lesson(shown, builder)], QUICK, progress=False)
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
    model = model_of("maskable_ppo", context, block_vectors=8)
    assert imitate(model, [Lesson(shown, builder)], QUICK, progress=False).agreement > 0.9
    policy = TrainedPolicy(model.policy, builder)
    losses = [context.scorer.loss(policy.choose(one.request)) for one in shown]
    teacher = [context.scorer.loss(one.plan) for one in shown]
    assert np.mean(losses) < 1.5 * np.mean(teacher)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One short training for each policy on a model of 3 layers."""
    folders = {}
    kinds = {"blockwise": {}, "mlp": {}, "vectors": {"block_vectors": 4}}
    for kind, settings in kinds.items():
        folders[kind] = tmp_path_factory.mktemp(kind)
        policy = "mlp" if kind == "mlp" else "blockwise"
        config = short("ppo", 64, policy=policy, policy_settings=settings)
        train(config, make_envs(LadderContext()), folders[kind], progress=False)
    return folders


def test_a_policy_is_loaded_with_its_ladder(runs, context):
    policy = TrainedPolicy.load(runs["blockwise"], context)
    assert policy._encoder.ladder.spec["together"] == SPEC["together"]
    assert set(policy._encoder.ladder.cache_levels) == set(encoder_of(context).ladder.cache_levels)


@pytest.mark.parametrize("changed", [{"layers": 5}, {"packed": True}], ids=str)
def test_a_policy_serves_a_model_with_another_ladder(runs, changed):
    """More layers, or weights that have fewer levels."""
    other = LadderContext(**changed)
    policy = TrainedPolicy.load(runs["blockwise"], other)
    request = Request.at_fraction(other.memory, 8, 2000, 0.5)
    assert fits(other, policy.choose(request), request)
    if "layers" in changed:
        with pytest.raises(ArtifactError, match="vector for each of 10 items, but this model has"):
            TrainedPolicy.load(runs["vectors"], other)
        with pytest.raises(ArtifactError, match="trained on a model of another shape"):
            TrainedPolicy.load(runs["mlp"], other)


def test_policies_of_v0_and_v1_serve_models_of_their_own_environment(runs, tmp_path, context):
    from tests.agents.synthetic import make_envs as make_v0

    masks = SyntheticContext(np.linspace(0.1, 0.8, 8))
    train(short("ppo", 64), make_v0(masks), tmp_path, progress=False)
    policy = TrainedPolicy.load(tmp_path, masks)
    assert not policy.lowers
    assert policy._encoder.space["blocks"].shape[0] == 8
    v1 = TrainedPolicy.load(runs["blockwise"], context)
    assert all(
        one.sample(Request.at_fraction(two.memory, 1, 30, 0.9), 2)
        for one, two in itertools.product([v1], [context])
    )
