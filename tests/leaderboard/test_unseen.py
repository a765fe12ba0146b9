"""Tasks across models: their requests, scores and errors."""

import gymnasium as gym
import numpy as np
import pytest

import rap_env
from agents.plan_searches import NoisyOrders, variant
from rap_env.errors import InvalidRequestError, UnknownNameError
from rap_env.leaderboard import unseen
from rap_env.leaderboard.unseen import PARTS, ModelResult, UnseenEvaluation
from rap_env.reward import ceiling_nll
from tools.unseen_budgets import budgets_of

TUNE = "RAPLadder/Unseen-Tune-v1"


@pytest.fixture(autouse=True)
def two_models(monkeypatch, tiny_models):
    monkeypatch.setenv("RAP_CACHE_DIR", str(tiny_models))
    some = {model: PARTS[TUNE][model] for model in ("tiny-even", "zoo-41")}
    monkeypatch.setitem(PARTS, TUNE, some)
    monkeypatch.setitem(gym.registry[TUNE].kwargs, "models", ["tiny-even", "zoo-41"])


def cheapest(observation):
    """The order by cost per useful byte, from what is observed."""
    rows, over = observation["ladder"], observation["request"][3]
    useful = np.minimum(rows[:, 6], over)
    price = np.expm1(rows[:, 7] * np.log1p(1e5)) / np.maximum(useful, 1e-9)
    return int(np.argmin(np.where(observation["action_mask"], price, np.inf)))


def made(*scores):
    models = tuple(ModelResult(f"m{n}", (s,), (1.0,)) for n, s in enumerate(scores))
    return UnseenEvaluation("x", TUNE, "test", 0, models)


def test_a_score_is_the_geometric_mean_over_models_with_an_interval_over_them():
    one = made(0.5, 2.0, 1.0)
    assert one.score == pytest.approx(1)
    low, high = one.interval
    assert 0.5 <= low < 0.8 < 1.25 < high <= 2
    model = ModelResult("m", (0.1, 0.5), (0.4, 0.8))
    assert model.score == pytest.approx(0.5)
    assert str(one).splitlines()[0].startswith("x on RAPLadder/Unseen-Tune-v1, test text, 0 runs")


def test_every_model_has_five_budgets_and_the_episodes_have_those_between():
    for models in PARTS.values():
        for budgets in models.values():
            assert len(budgets) == len(unseen.ORDER_LOSSES)
            assert sorted(budgets, reverse=True) == budgets
    env = gym.make(TUNE, disable_env_checker=True)
    for seed in range(20):
        _, info = env.reset(seed=seed)
        budgets = PARTS[TUNE][info["model"]]
        assert budgets[-1] <= info["request"]["budget_bytes"] <= budgets[0]
    assert budgets_of("tiny-even") == PARTS[TUNE]["tiny-even"]


def test_the_order_has_a_score_of_one_as_a_method_and_as_a_function():
    method, function = (
        rap_env.evaluate(policy, TUNE, "test", name="order")
        for policy in ("cost_per_byte", cheapest)
    )
    assert method.score == 1
    assert function.score == pytest.approx(1, abs=0.05)
    assert [model.model for model in function.models] == ["tiny-even", "zoo-41"]


def test_more_runs_lose_less_and_a_plan_over_its_budget_has_the_ceiling():
    few, many = (
        rap_env.evaluate(NoisyOrders, TUNE, name="noisy", runs=runs).score for runs in (0, 16)
    )
    random = variant(NoisyOrders, scales=(100.0, 100.0))
    random = rap_env.evaluate(random, TUNE, name="random").score
    assert many < few == 1 < random
    invalid = rap_env.evaluate(lambda observation: 24, TUNE, "test", name="invalid")
    assert set(invalid.models[0].delta_nll) == {ceiling_nll(512)}


def test_bad_input_is_named_in_one_sentence():
    with pytest.raises(InvalidRequestError, match="runs must be a whole number of at least 0"):
        rap_env.evaluate(cheapest, TUNE, name="x", runs=-1)
    with pytest.raises(InvalidRequestError, match="runs is for tasks across models"):
        rap_env.evaluate(cheapest, "RAPLadder/TinyEven-v0", name="x", runs=2)
    with pytest.raises(UnknownNameError, match="zoo-99"):
        gym.make("RAPLadder-v0", model="zoo-99")
