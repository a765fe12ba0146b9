"""Searches, imitation and PPO on models as arrays, and the methods that are made of them."""

import gymnasium as gym
import numpy as np
import pytest
import torch

from agents import unseen
from agents.unseen import Bench, SetNetwork
from rap_env.ladder.features import REQUEST_FEATURES, EveryLevel
from rap_env.leaderboard.unseen import arguments_of
from rap_env.policies.loading import make_method

TUNE = "RAPLadder/Unseen-Tune-v1"


@pytest.fixture(scope="module", autouse=True)
def module_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAP_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def envs():
    arguments = {**arguments_of(TUNE), "models": ["tiny-even", "zoo-41"], "every_level": True}
    return gym.make("RAPAcross-v0", **arguments, disable_env_checker=True).unwrapped.envs


@pytest.fixture
def benches(envs):
    return [Bench.of(env) for env in envs]


def network(seed=0):
    torch.manual_seed(seed)
    return SetNetwork(len(EveryLevel.features), len(REQUEST_FEATURES), width=16)


def test_without_noise_plans_are_those_of_the_order_by_cost_per_byte(envs, benches):
    for env, bench in zip(envs, benches, strict=True):
        every, rng = np.arange(bench.count), np.random.default_rng(0)
        plans = [bench.ladder.plan(row) for row in bench.noisy(every, rng, scale=0.0).tolist()]
        order = make_method("cost_per_byte", env.context, env.encoder.ladder_bytes)
        same = [plan == order.choose(r) for plan, r in zip(plans, bench.requests, strict=True)]
        assert np.mean(same) > 0.8  # costs are observed on a log scale with a floor


def test_a_search_keeps_the_best_plan_that_fits_each_request(benches):
    bench = benches[0]
    every = np.arange(bench.count)
    bench.search(np.random.default_rng(0), noisy=2, rounds=0, offspring=0)
    before = bench.measure(bench.best(every))
    bench.search(np.random.default_rng(1), noisy=1, rounds=2, offspring=4)
    best = bench.best(every)
    assert not bench.observer.over_bytes(every, best).any()
    after = bench.measure(best)
    assert (after <= before).all()
    assert after.mean() < before.mean()
    assert (np.diff(after) >= 0).all()  # budgets shrink


def test_models_play_together_as_they_do_alone(benches):
    which = [np.arange(bench.count) for bench in benches]
    net = network()

    def choose(seen, plans):
        return unseen.greedy(net, seen, plans)

    together = unseen.play_together(benches, which, choose)
    for bench, own, positions in zip(benches, which, together, strict=True):
        (alone,) = unseen.play_together([bench], [own], choose)
        np.testing.assert_array_equal(alone, positions)
        assert not bench.observer.over_bytes(own, positions).any()


def test_the_agent_of_an_environment_takes_the_plans_of_the_arrays(envs, benches):
    net = network(1)
    act = unseen.acting(net)
    across = gym.make(TUNE, every_level=True, disable_env_checker=True).unwrapped
    bench, env = benches[1], envs[1]
    (positions,) = unseen.play_together(
        [bench], [np.arange(2)], lambda seen, plans: unseen.greedy(net, seen, plans)
    )
    for request, row in zip(bench.requests, positions, strict=False):
        observation, over = env.reset(options={"request": request})[0], False
        while not over:
            observation, _, over, *_ = env.step(act(across.padded(observation)))
        assert env.plan == bench.ladder.plan(row.tolist())


def test_imitation_then_ppo_lose_less_than_the_order(benches):
    for bench in benches:
        bench.search(np.random.default_rng(0), noisy=8, rounds=2, offspring=4)
    net, every = network(), [np.arange(bench.count) for bench in benches]

    def lost():
        ends = unseen.play_together(benches, every, lambda s, p: unseen.greedy(net, s, p))
        return np.mean([bench.measure(e).mean() for bench, e in zip(benches, ends, strict=True)])

    untrained = lost()
    states = unseen.teacher_states(benches, ways=4, most=1, seed=0)
    unseen.fit(net, states, unseen.imitation_loss, updates=200, batch_size=64, seed=0)
    imitated = lost()
    rewards = []
    unseen.improve(net, benches, 8, 1e-3, 0, lambda update, mean: rewards.append(mean))
    assert imitated < 0.9 * untrained
    assert len(rewards) == 8
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) - 0.05


def test_a_network_predicts_losses_of_plans(benches):
    for bench in benches:
        bench.search(np.random.default_rng(0), noisy=8, rounds=2, offspring=4)
    net, data = network(), unseen.measured_plans(benches)
    unseen.fit(net, data, unseen.prediction_loss, updates=300, batch_size=64, seed=0)
    bench = benches[0]
    with torch.no_grad():
        predicted = net(unseen.plan_observations(bench.observer, bench.known))[1].numpy()
    assert np.corrcoef(predicted, np.log(np.clip(bench.losses, 0, None) + 0.05))[0, 1] > 0.8


@pytest.mark.parametrize("runs", [1, 8])
@pytest.mark.parametrize(
    "kind", ["NoisyOrders", "RandomOrders", "Evolved", "Uniform", "Predicted", "Acting"]
)
def test_each_method_fits_and_counts_its_runs(envs, kind, runs):
    given = {"network": network(), "networks": [network(2)]}
    method = unseen.variant(getattr(unseen, kind), **given)
    policy = method((envs[0].context, envs[0].encoder.ladder_bytes, 0, "tight"))
    policy.max_evaluations = runs
    request = envs[0].sampler.requests[8]
    plan = policy.choose(request)
    assert envs[0].memory.peak_bytes(plan, request) <= request.budget_bytes
    assert policy.evaluations == (0 if runs == 1 else 1 if kind == "Uniform" else policy.evaluations)
    assert policy.evaluations <= runs
