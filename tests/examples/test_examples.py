"""Each example learns or improves something, with fewer steps than when it is run as a program."""

import copy
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import gymnasium as gym
import pytest
from click.testing import CliRunner

import rap_env
from rap_env.cli import cli
from rap_env.leaderboard.entries import Entry, nested_share
from rap_env.leaderboard.tasks import pinned_task
from rap_env.models.families.families import FAMILIES
from rap_env.policies.loading import make_method
from rap_env.policies.method import Basis
from tests.examples.notebooks import run

REMOVALS = "RAPPrune/SmolLM2-Table-v1"
EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name):
    """The module of an example."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_ppo_single_file():
    module = example("ppo_single_file")
    before, after = (
        rap_env.evaluate(module.train(updates), module.TASK, name="ppo") for updates in (0, 6)
    )
    assert after.mean_delta_nll < 0.8 * before.mean_delta_nll
    assert all(cell.fits for cell in after.cells)


@pytest.mark.slow
def test_sb3_maskable_ppo():
    module = example("sb3_maskable_ppo")
    before, after = (
        rap_env.evaluate(module.train(steps), module.TASK, name="sb3") for steps in (0, 16_384)
    )
    assert after.mean_delta_nll < 0.8 * before.mean_delta_nll


@pytest.mark.slow
def test_across_models():
    module = example("across_models")
    before, after = (
        rap_env.evaluate(module.train(0, steps), module.JUDGED_ON, name="across").score
        for steps in (0, 24_576)
    )
    assert after < 0.9 * before


def test_first_steps():
    """The notebook's cells run, and its outputs are those of its cells."""
    path = EXAMPLES / "first_steps.ipynb"
    assert path.stat().st_size < 300_000
    stored = json.loads(path.read_text(encoding="utf-8"))
    again = copy.deepcopy(stored)
    names = run(again, {"STEPS = 600_000": "STEPS = 512", "[make_env] * 64": "[make_env] * 8"})
    assert all(cell.fits for cell in names["result"].cells)
    cells = [cell for cell in stored["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    printed = 0
    for before, after in zip(stored["cells"], again["cells"], strict=True):
        if "learn(STEPS)" in "".join(before["source"]):
            break
        for old, new in zip(before.get("outputs", ()), after.get("outputs", ()), strict=True):
            assert old.get("text") == new.get("text")
            printed += "text" in old
    assert printed == 3


def test_custom_method():
    module = example("custom_method")
    found = {
        name: rap_env.evaluate(name, module.TASK, name=name).mean_delta_nll
        for name in (*module.ASKED, module.NAME)
    }
    assert found[module.NAME] < min(found[name] for name in module.ASKED)
    request = ["--batch", "8", "--seq", "1024", "--budget", "120MiB", "--json"]
    command = ["choose", *request, "--policy", module.NAME]
    chosen = json.loads(CliRunner().invoke(cli, command).stdout)
    assert chosen["fits"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    script = [sys.executable, str(EXAMPLES / "custom_method.py")]
    ran = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    assert f"{module.NAME:38} mean ΔNLL {found[module.NAME]:.4f}" in ran.stdout, ran.stderr
    env = gym.make(module.TASK).unwrapped
    asked = [make_method(name, env.context, env.encoder.ladder_bytes) for name in module.ASKED]
    plans = [method.choose(rap_env.Request(8, 1024, 120 * 2**20)) for method in asked]
    assert chosen["levels"] in [plan.levels for plan in plans]


@pytest.mark.slow
def test_custom_model_family():
    with mock.patch.dict(FAMILIES):  # the example adds its own
        module = example("custom_model_family")
        profile = module.order(module.trained(steps=60), removals=2)
    assert len(profile.order) == 2
    rises = profile.first_pass
    assert rises[profile.order_indices[0]] == rises.min() < 0.5 * rises.max()
    assert rises.max() > 0.05


def test_custom_reward():
    module = example("custom_reward")
    plain, wrapped = gym.make(module.TASK), module.FreeBytes(gym.make(module.TASK), weight=2.0)
    returns = {act: module.mean_return(wrapped, act, 5) for act in (module.first_in_order,)}
    found = module.mean_return(plain, module.first_in_order, 5)
    assert found < returns[module.first_in_order] < found + 2.0
    assert module.mean_return(wrapped, module.largest, 5) < returns[module.first_in_order]


def test_custom_workload():
    module = example("custom_workload")
    env = module.Requests(gym.make("RAPLadder-v0", model=module.MODEL), module.night_and_day)
    seen = {env.reset()[1]["request"]["batch_size"] for _ in range(30)}
    assert 1 in seen
    assert max(seen) > 4
    rap, lowest = (
        module.mean_loss(env, rap_env.load_policy(name, env.unwrapped.memory), 10)
        for name in ("rap", "random")
    )
    assert 0 < rap < lowest


@pytest.mark.slow
def test_leaderboard_entry(tmp_path, monkeypatch):
    module = example("leaderboard_entry")
    found = {}
    for tries in (0, 20):
        monkeypatch.setattr(module.LocalSearch, "tries", tries)
        found[tries] = rap_env.evaluate(module.LocalSearch, module.TASK, name="local search")
    assert found[20].mean_delta_nll <= found[0].mean_delta_nll
    best = min(float(e.scores("calibration").mean()) for e in found[0].entries)
    assert found[0].mean_delta_nll < best + 1e-9, "measured plans include the published ones"
    found[0].entry("Best measured plans.").save(tmp_path / "mine.json")
    assert Entry.load(tmp_path / "mine.json").measured_on("calibration")


def test_noisy_orders_lose_less_than_random_ones(monkeypatch):
    module = example("control_orders")
    monkeypatch.setattr(module, "ORDERS", 8)
    mean = {
        method: rap_env.evaluate(method, REMOVALS, name=method.name)
        for method in (module.RandomOrders, module.NoisyOrders)
    }
    random, noisy = mean.values()
    assert all(cell.fits and 0 < cell.evaluations <= 8 for cell in (*random.cells, *noisy.cells))
    assert noisy.mean_delta_nll < 0.7 * random.mean_delta_nll


def test_a_tuned_list_loses_less_where_it_was_tuned_and_all_plans_of_a_list_are_nested(monkeypatch):
    module = example("control_lists")
    monkeypatch.setattr(module, "MOVES", 60)
    monkeypatch.setattr(module, "TUNED_ON", 8)
    env = gym.make(REMOVALS).unwrapped
    workload = pinned_task(REMOVALS).arguments["workload"]
    basis = Basis(env.context, env.encoder.ladder_bytes, 0, workload)
    fixed, tuned = module.FixedList(basis), module.TunedList(basis)
    fixed.requests = tuned.requests
    assert tuned.mean_nll(tuned.steps) < fixed.mean_nll(fixed.steps)
    assert sorted(tuned.steps) == sorted(fixed.steps)
    requests = pinned_task(REMOVALS).requests
    for method in (fixed, tuned):
        plans = [method.choose(request) for request in requests]
        assert nested_share(requests, plans, env.ladder) == 1.0


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A small dataset of episodes, under the id that the examples load."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(tmp_path_factory.mktemp("minari")))
        module = example("offline_learning")
        yield module.write(episodes=24).spec.dataset_id


def test_offline_episodes(dataset):
    """Episodes end on the way to the plans, and are the same each time."""
    module = example("offline_learning")
    env = gym.make(module.TASK, disable_env_checker=True)
    episodes = list(module.minari.load_dataset(dataset).iterate_episodes())
    assert len(episodes) == 24
    assert all(episode.terminations[-1] for episode in episodes), "every request fits"
    assert module.write("tests/again-v0", 2).total_steps == sum(map(len, episodes[:2]))
    best = env.unwrapped.context.best_measured
    env.reset(seed=0)
    plan = best(env.unwrapped.request)
    for action in episodes[0].actions:
        env.step(int(action))
    assert set(env.unwrapped.plan.levels) <= set(plan.levels), "steps lead towards the plan"


@pytest.mark.slow
def test_offline_cloning(dataset):
    module = example("offline_learning")
    before, after = (
        rap_env.evaluate(module.train(dataset, updates), module.TASK, name="cloning")
        for updates in (0, 100)
    )
    assert after.mean_delta_nll < 0.5 * before.mean_delta_nll
