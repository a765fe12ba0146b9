"""Pinned tasks, and evaluating policies of three forms beside the published methods."""

import json
from dataclasses import replace
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import rap_env
from experiments.compare import compare
from experiments.comparison.result_rows import ResultRow
from experiments.config.program_settings import CompareConfig
from rap_env.envs.config import EnvConfig
from rap_env.errors import ArtifactError, CorpusError, InvalidRequestError, UnknownNameError
from rap_env.leaderboard.entries import ENTRIES, Entry, published_entries
from rap_env.leaderboard.tasks import pinned_task, pinned_tasks
from rap_env.leaderboard.unseen import ARGUMENTS
from rap_env.plan import Plan
from rap_env.policies.loading import StaticPolicy, load_policy
from rap_env.scoring.corpus_loading import load_corpus
from tests.tiny import tiny_llm, tiny_tokenizer

V0, V1 = "RAPPrune/SmolLM2-Table-v1", "RAPLadder/SmolLM2-Table-v1"
LOW_BITS = "RAPLadder/SmolLM2-LowBits-Table-v0"
TABLES = [V0, V1, LOW_BITS, "RAPLadder/Gemma3-270M-Table-v1"]


def first_valid(observation):
    return int(np.flatnonzero(observation["action_mask"])[0])


class FirstValid:
    """A policy in the form of a stable-baselines3 model that takes masks."""

    def predict(self, observation, deterministic=False, action_masks=None):
        assert deterministic
        return np.array(np.flatnonzero(action_masks)[0]), None


class LooksAtObservations:
    """One in the form of a model that takes no masks."""

    def predict(self, observation, deterministic=False):
        return np.array(first_valid(observation)), None


@pytest.fixture(scope="module")
def packaged():
    """The packaged policy of v1 on its task, on held-out text."""
    memory = gym.make(V1).unwrapped.memory
    return rap_env.evaluate(load_policy("rap", memory), V1, "test", name="packaged")


@pytest.mark.parametrize("name", TABLES)
def test_a_pinned_task_is_an_environment_whose_arguments_are_fixed(name):
    env = gym.make(name)
    assert env.spec.reward_threshold == pinned_task(name).reward_threshold < 0
    check_env(env.unwrapped, skip_render_check=True)
    first, second = (gym.make(name).reset(seed=3)[1]["request"] for _ in range(2))
    assert first == second
    assert pinned_task(name).calibration_sha256 == env.unwrapped.context.table.text["sha256"]
    vector = gym.make_vec(name, num_envs=3)
    assert vector.reset(seed=0)[0]["action_mask"].shape == (3, env.action_space.n)


def test_tasks_over_levels_have_the_ladder_of_their_entries_whatever_a_model_has():
    for task in pinned_tasks().values():
        if task.environment == "RAPLadder-v0":
            arguments = task.arguments
            levels = "all" if "LowBits" in task.name else "four-bits"
            if "/Tiny" in task.name:
                levels = ARGUMENTS["levels"]
            assert arguments["levels"] == arguments["workload"]["levels"] == levels


def test_a_task_has_distinct_requests_and_bounds_of_what_was_not_measured():
    task = pinned_task(V1)
    assert len({request.budget_bytes for request in task.requests}) == 30
    shapes = {(request.batch_size, request.seq_len_tokens) for request in task.requests}
    assert len(shapes) == 10
    table = gym.make(V1).unwrapped.context.table
    assert len(table.predictor.members) == 8
    assert table.predictor.pessimism > 0


def test_a_request_for_an_earlier_version_names_the_new_one():
    with pytest.raises(gym.error.DeprecatedEnv, match=f"Please use `{V1}` instead"):
        gym.make(V1.replace("-v1", "-v0"))


def test_a_live_task_refuses_another_calibration_text(tmp_path):
    """Text that the package does not have is pinned by the hash of its tokens."""
    task = pinned_task("RAPPrune/SmolLM2-v1")
    text = EnvConfig.of(**task.arguments).corpus_config()
    assert text.sha256 == task.calibration_sha256
    (tmp_path / "other.jsonl").write_text(json.dumps({"page": "word " * 100}))
    other = replace(text, source=str(tmp_path / "other.jsonl"), windows=1, window_tokens=16)
    with pytest.raises(CorpusError, match=f"asked for \\({text.sha256[:12]}\\)"):
        load_corpus(other, tiny_llm(tokenizer=tiny_tokenizer()))


def test_all_tasks_have_entries_for_each_of_their_requests():
    for task in pinned_tasks().values():
        entries = published_entries(task.comparison)
        names = [entry.name for entry in entries]
        controls = {"Random orders", "Noisy orders", "Fixed list", "Tuned list"}
        own = {"Knapsack", "Do nothing", "Remove everything"}
        own |= {"Greedy per byte"} if "/Tiny" in task.name else {"RAP policy", *controls}
        assert own <= set(names)
        assert len(set(names)) == len(names)
        for entry in entries:
            assert all(len(run.plans) == len(task.requests) for run in entry.runs)
            if "records" in entry.origin or entry.measured_on("test"):
                assert entry.scores("test").shape == (len(task.requests),)


@pytest.mark.parametrize("name", TABLES)
def test_published_losses_on_the_calibration_text_are_those_of_the_table(name):
    context, task = gym.make(name).unwrapped.context, pinned_task(name)
    for entry in published_entries(task.comparison):
        for run in entry.runs:
            plans = [Plan.of(levels) for levels in run.plans]
            known = not any(map(context.scorer.is_predicted, plans))  # not the lowest levels
            if known and entry.measured_on("calibration"):
                found = np.array(context.scorer.nll_many(plans)) - context.scorer.native_nll
                np.testing.assert_allclose(found, run.delta_nll["calibration"], atol=1e-9)
            peaks = [
                context.memory.peak_bytes(plan, request)
                for plan, request in zip(plans, task.requests, strict=True)
            ]
            budgets = [request.budget_bytes for request in task.requests]
            assert tuple(p <= b for p, b in zip(peaks, budgets, strict=True)) == run.fits


def test_three_forms_of_one_policy_give_one_result():
    found = [
        rap_env.evaluate(policy, V0, name="first")
        for policy in (first_valid, FirstValid(), LooksAtObservations())
    ]
    assert len({one.digest for one in found}) == 1
    assert len({one.mean_delta_nll for one in found}) == 1
    assert all(cell.fits for cell in found[0].cells)
    with pytest.raises(InvalidRequestError, match="A policy is an object with choose"):
        rap_env.evaluate(3, V0, name="x")
    for wrong in (None, ["layer00.ffn"]):
        with pytest.raises(InvalidRequestError, match="must return a rap_env.Plan, .* not"):
            rap_env.evaluate(SimpleNamespace(choose=lambda _, w=wrong: w), V0, name="x")


def test_the_packaged_policy_has_its_published_result(packaged):
    assert packaged.mean_delta_nll == pytest.approx(0.9205, abs=0.0001)
    assert packaged.num_predicted == 0
    knapsack = next(entry for entry in packaged.entries if entry.name == "Knapsack")
    mean, low, high = packaged.against(knapsack)
    assert mean == pytest.approx(packaged.mean_delta_nll - knapsack.scores("test").mean())
    assert low < mean < high < 0
    shapes = np.split(packaged.scores - knapsack.scores("test"), 10)
    assert low > min(shape.mean() for shape in shapes)
    assert high < max(shape.mean() for shape in shapes)
    order = [line.partition("  ")[0] for line in str(packaged).splitlines()]
    assert order.index("packaged (this)") < order.index("Uniform settings")


def test_a_policy_that_ignores_the_mask_is_told_so():
    result = rap_env.evaluate(lambda _: 0, V1, "test", name="zero")
    assert all(cell.truncated and not cell.fits for cell in result.cells)
    assert result.num_predicted == 0
    assert "30 episodes ended by invalid actions" in str(result)


def test_doing_nothing_is_worse_than_removing_everything_and_than_every_method():
    found = rap_env.evaluate(StaticPolicy(Plan()), V0, name="dense")
    assert not any(cell.fits for cell in found.cells)
    assert {cell.loss.delta_nll for cell in found.cells} == {0.0}
    assert found.scores == pytest.approx(np.full(25, 2 * np.log(49152)))
    for task in pinned_tasks().values():
        measured = [e for e in published_entries(task.comparison) if e.measured_on("test")]
        scores = {entry.name: entry.scores("test").mean() for entry in measured}
        assert max(scores, key=scores.get) == "Do nothing"
        assert scores["Do nothing"] == pytest.approx(2 * task.ceiling_nll)


@pytest.mark.parametrize("name", TABLES)
def test_every_plan_that_fits_ranks_above_every_plan_that_does_not(name):
    """Random plans of all depths: in scores, and in returns on each scale and with each timing."""
    task, rng = pinned_task(name), np.random.default_rng(0)
    rewards = [
        {"name": "perplexity", "scale": scale, "timing": timing, "loss_cap": cap}
        for scale in ("nats", "log")
        for timing in ("terminal", "dense")
        for cap in (None, 3.0)
    ]
    envs = [gym.make(name, reward=reward).unwrapped for reward in rewards]
    returns = {number: {True: [], False: []} for number in range(len(envs))}
    delta_nll, fits = [], []
    for episode in range(16 * len(envs)):
        number = episode % len(envs)
        env = envs[number]
        _, info = env.reset(seed=episode)
        stop = rng.integers(1, 3) if episode // len(envs) % 2 else 1000  # then invalid actions only
        total, over, ended = 0.0, False, False
        while not over:
            valid = env.action_masks()
            if stop > 0 or valid.all():
                action = rng.choice(np.flatnonzero(valid))
            else:
                action = rng.choice(np.flatnonzero(~valid))
            stop -= 1
            _, _, ended, truncated, info = env.step(action)
            total += info["reward_terms"]["perplexity"]
            over = ended or truncated
        returns[number][ended].append(total)
        fits.append(ended)
        delta_nll.append(info.get("delta_nll", info.get("loss")))
    assert any(fits)
    assert not all(fits)
    scores = task.scores(delta_nll, fits)
    assert scores[np.array(fits)].max() < scores[~np.array(fits)].min()
    for paid in returns.values():
        assert paid[True]
        assert paid[False]
        assert min(paid[True]) > max(paid[False])


def test_saved_rows_are_results_that_compare_reads(packaged, tmp_path):
    path = tmp_path / "mine" / "evaluate" / "results.jsonl"
    packaged.save(path)
    assert packaged.save(path) == path
    rows = [ResultRow.from_record(json.loads(line)) for line in path.read_text().splitlines()]
    assert len(rows) == 60
    assert len({row.key for row in rows}) == 30, "the same evaluation, twice"
    assert {row.method for row in rows} == {"packaged"}
    other = rap_env.evaluate(first_valid, V1, "test", name="packaged")
    keys = {ResultRow.from_record(row).key for row in other.rows()}
    assert not keys & {row.key for row in rows}, "one name, other plans: other rows"
    table = compare(CompareConfig(runs=[str(tmp_path / "mine")], format="text"))
    assert "packaged" in table
    assert "0.921" in table


def test_wrong_names_and_texts_are_refused():
    with pytest.raises(UnknownNameError, match="SmolLM2-Table-v1"):
        rap_env.evaluate(first_valid, "RAPPrune/SmolLM2-Tabel-v1", name="x")
    with pytest.raises(UnknownNameError, match="calibration"):
        rap_env.evaluate(first_valid, V1, "held-out", name="x")
    with pytest.raises(UnknownNameError, match="knapsack"):
        rap_env.evaluate("knapsak", V1, name="x")


def test_an_entry_is_checked_when_read(packaged, tmp_path):
    path = packaged.entry("The packaged policy.").save(tmp_path / "mine.json")
    assert json.loads(path.read_text(encoding="utf-8"))["kind"] == "leaderboard entry"
    assert Entry.load(path).digest == packaged.entry("Another name.").digest
    published = Entry.load(ENTRIES / "SmolLM2-v1" / "rap.json.gz")
    assert [run.seed for run in published.runs] == [None]
    short = packaged.entry("Incomplete.")
    run = short.runs[0].__class__(None, short.runs[0].plans[:3], short.runs[0].delta_nll, (True,))
    Entry("short", "SmolLM2-v1", "x", (run,)).save(path)
    with pytest.raises(ArtifactError, match="plans and losses do not match"):
        Entry.load(path)
