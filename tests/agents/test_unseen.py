"""Searches, imitation and PPO on models as arrays, and the methods that are made of them."""

import gymnasium as gym
import numpy as np
import pytest
import torch

from agents import plan_searches, unseen
from agents.plan_searches import Bench, variant
from rap_env.importance.gradient_costs import native_changes
from rap_env.ladder.features import EveryLevel
from rap_env.ladder.items import Ladder
from rap_env.ladder.ladder_bytes import LadderBytes
from rap_env.leaderboard.unseen import arguments_of
from rap_env.policies.loading import make_method
from rap_env.policies.method import Basis
from rap_env.request import Request

TUNE = "RAPLadder/Unseen-Tune-v1"


@pytest.fixture(scope="module", autouse=True)
def module_cache(tiny_models):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAP_CACHE_DIR", str(tiny_models))
        yield


@pytest.fixture(scope="module")
def envs():
    arguments = {**arguments_of(TUNE), "models": ["tiny-even", "zoo-41"], "every_level": True}
    across = gym.make("RAPAcross-v0", **arguments, disable_env_checker=True).unwrapped
    return [across.env_of(model) for model in across.models]


@pytest.fixture
def benches(envs):
    return [Bench.of(env) for env in envs]


def test_without_noise_plans_are_those_of_the_order_by_cost_per_byte(envs, benches):
    for env, bench in zip(envs, benches, strict=True):
        every, rng = bench.every, np.random.default_rng(0)
        plans = [bench.ladder.plan(row) for row in bench.noisy(every, rng, scale=0.0).tolist()]
        order = make_method("cost_per_byte", env.context, env.encoder.ladder_bytes)
        same = [plan == order.choose(r) for plan, r in zip(plans, bench.requests, strict=True)]
        assert np.mean(same) > 0.8  # costs are observed on a log scale with a floor


def test_a_search_keeps_the_best_plan_that_fits_each_request(benches):
    bench = benches[0]
    every = bench.every
    bench.search(np.random.default_rng(0), noisy=2, rounds=0, offspring=0)
    before = bench.measure(bench.best(every))
    bench.search(np.random.default_rng(1), noisy=1, rounds=2, offspring=4)
    best = bench.best(every)
    assert not bench.observer.over_bytes(every, best).any()
    after = bench.measure(best)
    assert (after <= before).all()
    assert after.mean() < before.mean()
    assert (np.diff(after) >= 0).all()  # budgets shrink


def test_the_knapsack_is_that_of_the_package_unless_costs_are_corrected(envs, benches):
    for env, bench in zip(envs, benches, strict=True):
        knapsack = make_method("knapsack", env.context, env.encoder.ladder_bytes)
        for number in range(0, len(bench.every), 4):
            request = bench.requests[number]
            (own,) = bench.knapsack(number, bench.log_costs[None])
            theirs = bench.ladder.positions(knapsack.choose(request))
            costs = np.c_[np.zeros(len(own)), np.exp(bench.log_costs)]
            items = np.arange(len(own))
            assert costs[items, own].sum() < 1.05 * costs[items, theirs].sum() + 1e-3
            dearer = bench.log_costs + 20.0 * (items == own.argmax())[:, None]
            (other,) = bench.knapsack(number, dearer[None])
            if number == 0:  # a small budget needs the item, whatever it costs
                assert other[own.argmax()] == 0 < own.max()
            which = np.full(2, number)
            assert not bench.observer.over_bytes(which, np.stack([own, other])).any()


def test_a_policy_loses_less_than_the_knapsack_on_its_own_models(benches):
    for bench in benches:
        bench.search(np.random.default_rng(0), noisy=8, rounds=2, offspring=4)

    def lost(networks):
        losses = []
        for bench in benches:
            means = unseen.corrections(networks, bench, bench.every)
            rows = [bench.knapsack(n, bench.log_costs + own[None]) for n, own in enumerate(means)]
            losses.append(bench.measure(np.concatenate(rows)).mean())
        return np.mean(losses)

    trained = unseen.policy(benches, count=1, rounds=2, updates=120)
    assert lost(trained) < 0.97 * lost(unseen.new_networks(1, 0))


def test_networks_predict_losses_of_plans(benches):
    for bench in benches:
        bench.search(np.random.default_rng(0), noisy=8, rounds=2, offspring=4)
    (network,) = unseen.predictors(benches, count=1, updates=300, seed=0)
    bench = benches[0]
    seen = unseen.plan_observations(bench, bench.known)
    with torch.no_grad():
        predicted = network.eval()(seen)[1].numpy()
    assert np.corrcoef(predicted, unseen.log_losses(bench.losses))[0, 1] > 0.8


def test_networks_see_removal_where_they_learned_it_whatever_levels_there_are(envs):
    context = envs[0].context
    levels = {"weights": ["removed"], "embeddings": ["int4-compact"]}
    ladder_bytes = LadderBytes(context.memory, Ladder.of(context.memory.facts, levels))
    policy = variant(unseen.Corrected, actors=unseen.new_networks(1, 0))
    policy = policy((context, ladder_bytes, 0, "tight"))
    costs = ladder_bytes.costs(1, 64)
    budget = (costs.native_peak_bytes + costs.least_peak_bytes) // 2
    request = Request(1, 64, budget)
    bench = Bench(policy._encoder, [request], lambda rows: np.zeros(len(rows)))
    which, native = np.zeros(1, np.int64), bench.observer.start(1)
    shown, seen = unseen.observed(bench, which, native), bench.observer.observe(which, native)
    one, three = (EveryLevel.features.index(f"cost{n}") for n in (1, 3))
    rows, block = shown["ladder"][0].numpy(), 0
    assert rows[block, three] == pytest.approx(seen["ladder"][0, block, one])
    assert rows[block, one] == 0 < rows[-1, one]  # the last item is the embeddings
    networks = unseen.new_networks(1, 0)
    with torch.no_grad():
        networks[0].levels.bias[:] = torch.arange(5.0)
    means = unseen.corrections(networks, bench, which)
    assert means[0, [block, -1], 0].tolist() == [2, 0]
    assert context.memory.peak_bytes(policy.choose(request), request) <= budget


@pytest.mark.parametrize("runs", [1, 8])
@pytest.mark.parametrize(
    "kind",
    [
        plan_searches.NoisyOrders,
        plan_searches.Evolved,
        plan_searches.Uniform,
        plan_searches.CrossTerms,
        unseen.Predicted,
        unseen.Corrected,
        unseen.ActorCritic,
    ],
)
def test_each_method_fits_and_counts_its_runs(envs, kind, runs):
    networks = unseen.new_networks(2, 0)
    method = variant(kind, actors=networks, critics=networks)
    policy = method((envs[0].context, envs[0].encoder.ladder_bytes, 0, "tight"))
    policy.max_evaluations = runs
    request = envs[0].sampler.requests[8]
    plan = policy.choose(request)
    assert envs[0].memory.peak_bytes(plan, request) <= request.budget_bytes
    assert policy.evaluations <= (0 if runs == 1 else runs)


def test_two_levels_cost_their_sum_and_what_they_share(envs, benches):
    env, bench = envs[0], benches[0]
    method = plan_searches.CrossTerms(Basis(env.context, env.encoder.ladder_bytes))
    first, second = 2, 5
    plans = np.zeros((4, len(bench.ladder)), np.int64)
    plans[1, first], plans[[2, 3], second], plans[3, first] = 2, 1, 2
    native, alone, other, both = method._predicted(bench, plans)
    assert native == 0
    assert [alone, other] == pytest.approx(np.exp(bench.log_costs[[first, second], [1, 0]]))
    llm, windows = env.context.scorer.llm, env.context.scorer.corpus.tokens
    items = {env.ladder.items[i].name: [env.ladder.items[i].levels[p]] for i, p in ((2, 2), (5, 1))}
    changes = [next(iter(c.values())) for c in native_changes(llm, windows, items).values() if c]
    shared = float((changes[0] * changes[1]).sum()) / windows[:, 1:].numel()
    assert both == pytest.approx(alone + other + shared)
    assert abs(shared) > 1e-5


def test_what_a_run_says_of_a_plan_is_believed_of_plans_near_it(benches):
    model = benches[0]
    rng = np.random.default_rng(0)
    plans = model.noisy(model.every, rng)
    ran = Bench(model.encoder, model.requests, lambda rows: losses[: len(rows)])
    priors = Bench(model.encoder, model.requests, lambda rows: np.zeros(len(rows)))
    assert not unseen.posterior(ran, priors, plans).any()
    losses = np.array([0.1, 2.0])
    ran.measure(plans[[0, -1]])
    good, bad = unseen.posterior(ran, priors, plans[[0, -1]])
    near = plans[[-1]].copy()
    near[0, 0] = 1 - min(1, near[0, 0])
    (beside,) = unseen.posterior(ran, priors, near)
    assert good < 0 < beside < bad
