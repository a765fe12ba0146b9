from __future__ import annotations

import itertools

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env, data_equivalence
from gymnasium.wrappers import FlattenObservation, RecordVideo

import rap_env
from rap_env.blocks import BlockMask
from rap_env.envs.parts import TASK_DOCUMENTS, task_scorer
from rap_env.envs.prune import RAPPruneEnv
from rap_env.errors import (
    InfeasibleBudgetError,
    InvalidRequestError,
    NonFiniteScoreError,
    UnknownNameError,
)
from rap_env.workload import Request
from tests.envs.conftest import LAYERS, make_workbench
from tests.tiny import tiny_model, tiny_tokenizer

COUNT = 2 * LAYERS
DENSE_TIMING = {"name": "perplexity", "timing": "dense"}
LONG = {"batch_size": 8, "seq_len_tokens": 64}  # its budgets need attention blocks removed


def make(workbench, **settings) -> RAPPruneEnv:
    usual = {"workload": "grid", "infeasible": "clip"}  # a tiny model's workspace is large
    return RAPPruneEnv(workbench=workbench, **{**usual, **settings})


def request_at(workbench, fraction: float = 0.8) -> Request:
    return Request.at_fraction(workbench.memory, *LONG.values(), fraction)


def play(env, seed: int, masked: bool = False) -> list[tuple]:
    """One episode of random actions: what `reset` and each `step` returned."""
    env.action_space.seed(seed)
    seen, over = [env.reset(seed=seed)], False
    while not over:
        mask = env.unwrapped.action_masks().astype(np.int8) if masked else None
        seen.append(env.step(env.action_space.sample(mask)))
        over = seen[-1][2] or seen[-1][3]
    return seen


class TestContract:
    @pytest.mark.parametrize("workload", ["fixed", "grid", "azure-conv"])
    def test_gymnasium_accepts_it(self, workbench, workload):
        env = make(workbench, workload=workload, reward=DENSE_TIMING)
        check_env(env, skip_render_check=True, skip_close_check=True)

    @pytest.mark.filterwarnings("error", "ignore:.*unconventional shape:UserWarning")
    def test_stable_baselines_accepts_it(self, workbench):
        checker = pytest.importorskip("stable_baselines3.common.env_checker")
        checker.check_env(make(workbench))

    @pytest.mark.parametrize("name", ["PPO", "DQN"])
    def test_agents_of_stable_baselines_learn_on_it(self, workbench, name):
        sb3 = pytest.importorskip("stable_baselines3")
        short = {"n_steps": 16, "batch_size": 16} if name == "PPO" else {"learning_starts": 8}
        env = make(workbench)
        agent = getattr(sb3, name)("MultiInputPolicy", env, seed=0, device="cpu", **short)
        agent.learn(32)
        action, _ = agent.predict(env.reset(seed=1)[0], deterministic=True)
        assert env.action_space.contains(action.item())

    def test_maskable_ppo_finds_the_masks(self, workbench):
        contrib = pytest.importorskip("sb3_contrib")
        env = make(workbench, invalid_action_penalty=1e6)
        agent = contrib.MaskablePPO("MultiInputPolicy", env, n_steps=32, batch_size=16, seed=0)
        agent.learn(32)
        assert agent.rollout_buffer.rewards.min() > -1e5  # no invalid action was taken

    def test_several_run_as_a_vector_environment(self, workbench):
        envs = gym.vector.SyncVectorEnv([lambda: make(workbench) for _ in range(3)])
        seen, infos = envs.reset(seed=0)
        assert seen["blocks"].shape == (3, COUNT, 7)
        seen, _, _, _, infos = envs.step(np.array([0, 1, 2]))
        assert [len(removed) for removed in infos["removed"]] == [1, 1, 1]
        assert [row.tolist().index(0) for row in seen["action_mask"]] == [0, 1, 2]

    def test_it_flattens(self, workbench):
        env = FlattenObservation(make(workbench))
        seen, _ = env.reset(seed=0)
        assert seen.shape == (5 + 7 * COUNT + COUNT,)
        assert env.observation_space.contains(seen)

    @pytest.mark.parametrize("reward", ["perplexity", DENSE_TIMING])
    def test_random_play_is_the_same_for_the_same_seed(self, workbench, reward):
        one, other = (make(workbench, reward=reward, workload="azure-conv") for _ in range(2))
        for seed in range(10):
            first, second = play(one, seed), play(other, seed)
            assert data_equivalence(first, second)
            assert not data_equivalence(first[0], play(one, seed + 100)[0])

    def test_random_play_leaves_the_weights_as_they_were(self, workbench):
        weights = workbench.llm.model.state_dict()
        before = {name: tensor.clone() for name, tensor in weights.items()}
        play(make(workbench, reward=DENSE_TIMING), 99)
        assert workbench.llm.mask == BlockMask()
        assert all(torch.equal(before[name], tensor) for name, tensor in weights.items())


class TestEpisode:
    @pytest.mark.parametrize("seed", range(10))
    def test_each_valid_action_removes_a_block_until_the_request_fits(self, workbench, seed):
        env = make(workbench, reward=DENSE_TIMING)
        (_, start), *steps = play(env, seed, masked=True)
        budget = start["request"]["budget_bytes"]
        peaks = [start["peak_bytes"], *(info["peak_bytes"] for *_, info in steps)]
        assert all(after < before for before, after in itertools.pairwise(peaks))
        assert [peak <= budget for peak in peaks] == [False] * len(steps) + [True]
        assert [len(info["removed"]) for *_, info in steps] == list(range(1, len(steps) + 1))
        assert [terminated for _, _, terminated, _, _ in steps] == [False] * (len(steps) - 1) + [
            True
        ]
        assert not any(truncated for _, _, _, truncated, _ in steps)
        for seen, _, _, _, info in steps:
            mask = BlockMask.of(*info["removed"])
            assert env.observation_space.contains(seen)
            assert seen["action_mask"].tolist() == [int(n not in mask) for n in range(COUNT)]
            assert info["nll"] == pytest.approx(workbench.scorer.nll(mask))

    @pytest.mark.parametrize("seed", range(5))
    def test_both_timings_have_the_same_return(self, workbench, seed):
        returns = []
        for reward in ("perplexity", DENSE_TIMING):
            steps = play(make(workbench, reward=reward), seed)[1:]
            returns.append(sum(reward for _, reward, *_ in steps))
        assert returns[0] == pytest.approx(returns[1])

    def test_the_return_of_valid_actions_is_minus_the_loss(self, workbench):
        steps = play(make(workbench), 3, masked=True)[1:]
        assert sum(reward for _, reward, *_ in steps) == pytest.approx(-steps[-1][-1]["loss"])

    def test_reward_terms_add_up(self, workbench):
        for _, reward, _, _, info in play(make(workbench, reward=DENSE_TIMING), 5)[1:]:
            assert reward == pytest.approx(sum(info["reward_terms"].values()))
            assert set(info["reward_terms"]) == {"perplexity", "invalid_action"}

    def test_nll_is_told_when_it_was_measured(self, workbench):
        (_, start), *steps = play(make(workbench), 3, masked=True)
        assert start["nll"] == workbench.scorer.dense_nll
        assert start["loss"] == 0.0
        assert [("nll" in info) for *_, info in steps] == [False] * (len(steps) - 1) + [True]

    def test_one_evaluation_an_episode_by_default(self):
        bench = make_workbench()
        env = make(bench)
        env.reset(seed=0)
        bench.scorer.nll(BlockMask())
        before = bench.scorer.evaluations
        _, *steps = play(env, 3, masked=True)
        assert len(steps) > 1
        assert bench.scorer.evaluations - before == 1

    def test_an_invalid_action_changes_nothing_and_costs(self, workbench):
        env = make(workbench, invalid_action_penalty=0.25)
        env.reset(seed=0, options={"request": request_at(workbench, 0.7)})
        seen, *_ = env.step(1)
        again, reward, terminated, truncated, info = env.step(np.int64(1))
        assert data_equivalence(seen, again)
        assert (reward, terminated, truncated) == (-0.25, False, False)
        assert info["reward_terms"]["invalid_action"] == -0.25
        assert info["removed"] == ["layer00.ffn"]
        assert env.action_masks().tolist() == [True, False, True, True, True, True]

    def test_invalid_actions_truncate_at_the_stated_number(self, workbench):
        env = make(workbench, max_invalid_actions=2)
        env.reset(seed=0, options={"request": request_at(workbench, 0.7)})
        ends = [env.step(1)[2:4] for _ in range(3)]
        assert ends == [(False, False), (False, False), (False, True)]

    def test_a_truncated_episode_pays_the_loss_it_reached(self, workbench):
        env = make(workbench, max_invalid_actions=1, invalid_action_penalty=0.0)
        env.reset(seed=0, options={"request": request_at(workbench, 0.7)})
        env.step(0)
        _, reward, _, truncated, info = env.step(0)
        loss = workbench.scorer.nll(BlockMask.of(0)) - workbench.scorer.dense_nll
        assert truncated
        assert (reward, info["loss"]) == (pytest.approx(-loss), pytest.approx(loss))

    def test_step_needs_a_running_episode(self, workbench):
        env = make(workbench)
        with pytest.raises(ResetNeeded, match="call reset"):
            env.step(0)
        play(env, 0)
        with pytest.raises(ResetNeeded, match="The episode is over; call reset"):
            env.step(0)
        env.reset(seed=1)
        assert env.mask == BlockMask()

    @pytest.mark.parametrize("action", [-1, COUNT, 0.5])
    def test_an_action_that_is_none_is_refused_and_changes_nothing(self, workbench, action):
        env = make(workbench)
        env.reset(seed=0)
        with pytest.raises(UnknownNameError, match=r"Unknown action .*5 \(layer02\.ffn\)"):
            env.step(action)
        assert env.mask == BlockMask()

    def test_nan_from_the_model_leaves_the_episode_where_it_was(self):
        bench = make_workbench()
        env = make(bench, reward=DENSE_TIMING)
        start, _ = env.reset(seed=0, options={"request": request_at(bench, 0.7)})
        head = bench.llm.model.get_output_embeddings().weight
        kept = head.detach().clone()
        with torch.no_grad():
            head.fill_(torch.nan)
        bench.scorer.nll(BlockMask.of(1))  # measured before the damage, by the one-shot scan
        env.step(1)
        with pytest.raises(NonFiniteScoreError, match="gave a non-finite NLL"):
            env.step(3)
        assert env.mask == BlockMask.of(1)
        with torch.no_grad():
            head.copy_(kept)
        assert env.step(3)[-1]["removed"] == ["layer00.ffn", "layer01.ffn"]
        again, _ = env.reset(seed=0, options={"request": request_at(bench, 0.7)})
        assert data_equivalence(start, again)


@pytest.fixture(scope="module")
def bench():
    pytest.importorskip("lm_eval")
    return make_workbench(tokenizer=tiny_tokenizer())


class TestAccuracy:
    """With lm-eval's own code on generated tasks."""

    def test_the_return_is_the_drop_in_mean_accuracy(self, bench):
        tasks = {"names": ["rap_minimal_pairs", "rap_choice"], "limit": 12}
        env = make(bench, reward="accuracy", tasks=tasks)
        _, *steps = play(env, 1, masked=True)
        scorer = task_scorer(bench, tasks)
        mask = BlockMask.of(*steps[-1][-1]["removed"])
        drop = scorer.mean_accuracy(mask) - scorer.mean_accuracy(BlockMask())
        assert drop != 0
        assert [reward for _, reward, *_ in steps] == [0.0] * (len(steps) - 1) + [drop]
        assert steps[-1][-1]["reward_terms"] == {"accuracy": drop, "invalid_action": 0.0}
        assert "nll" in steps[-1][-1]

    def test_environments_share_the_tasks_of_a_workbench(self, bench):
        first = task_scorer(bench, ["rap_choice"])
        assert task_scorer(bench, {"names": ("rap_choice",)}) is first
        assert task_scorer(bench, {"names": ("rap_choice",), "limit": 3}) is not first
        assert first.config.limit == TASK_DOCUMENTS

    def test_combined_names_both_terms(self, bench):
        spec = {"name": "combined", "weights": {"perplexity": 0.5, "accuracy": 2.0}}
        env = make(bench, reward=spec, tasks={"names": ["rap_choice"], "limit": 4})
        _, reward, *_, info = play(env, 2, masked=True)[-1]
        assert info["reward_terms"]["perplexity"] == pytest.approx(-0.5 * info["loss"])
        assert reward == pytest.approx(sum(info["reward_terms"].values()))
        assert set(info["reward_terms"]) == {"perplexity", "accuracy", "invalid_action"}

    @pytest.mark.parametrize(
        ("tasks", "message"),
        [
            (["rap_choise"], "'rap_choise'; .* Did you mean 'rap_choice'"),
            ({"name": ["rap_choice"]}, "setting of the tasks: 'name'; .*'names'"),
            ("rap_choice", "list of tasks 'rap_choice'"),
        ],
    )
    def test_unknown_tasks_are_refused(self, bench, tasks, message):
        with pytest.raises(UnknownNameError, match=message):
            make(bench, reward="accuracy", tasks=tasks)


class TestRequests:
    def test_the_workload_draws_and_options_override(self, workbench):
        env = make(workbench)
        drawn = {env.reset(seed=seed)[1]["request"]["budget_bytes"] for seed in range(8)}
        assert len(drawn) > 3
        request = request_at(workbench, 0.7)
        for given in (
            request,
            {**LONG, "budget_bytes": request.budget_bytes},
            {**LONG, "budget_fraction": 0.7},
        ):
            env.reset(seed=0, options={"request": given})
            assert env.request == request

    def test_options_do_not_disturb_the_workload(self, workbench):
        plain, other = make(workbench), make(workbench)
        first = [plain.reset(seed=4)[1]["request"], plain.reset()[1]["request"]]
        other.reset(seed=4, options={"request": request_at(workbench)})
        assert [other.reset()[1]["request"]] == first[:1]

    def test_a_replay_starts_again_on_a_seeded_reset(self, workbench, tmp_path):
        path = tmp_path / "trace.csv"
        path.write_text(
            "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(f"t,{n},1\n" for n in (9, 19, 29))
        )
        spec = {"name": "trace", "path": str(path), "order": "replay"}
        env = make(workbench, workload=spec)
        seeds = (0, None, None, None, 7)
        seen = [env.reset(seed=seed)[1]["request"]["seq_len_tokens"] for seed in seeds]
        assert seen == [10, 20, 30, 10, 10]

    def test_requests_that_fit_the_dense_model_are_drawn_again(self, workbench):
        small, large = (workbench.memory.dense_peak_bytes(1, n) for n in (8, 64))
        budget = (small + large) // 2
        grid = {"name": "grid", "batch_sizes": [1], "seq_lens_tokens": [8, 64]}
        env = make(workbench, workload={**grid, "budget_bytes": [budget]})
        lengths = {env.reset(seed=n)[1]["request"]["seq_len_tokens"] for n in range(12)}
        assert lengths == {64}

    def test_a_workload_that_never_needs_pruning_is_refused(self, workbench):
        env = make(workbench, workload={"name": "fixed", "budget_bytes": 2**60})
        with pytest.raises(InvalidRequestError, match=r"each of 100 requests .* smaller budgets"):
            env.reset(seed=0)

    def test_an_option_that_fits_the_dense_model_is_refused(self, workbench):
        env = make(workbench)
        with pytest.raises(InvalidRequestError, match=r"dense model already fits .* smaller"):
            env.reset(options={"request": {**LONG, "budget_fraction": 1.0}})

    def test_an_infeasible_budget_is_refused_at_reset(self, workbench):
        env = make(workbench, infeasible="error", workload={"name": "fixed", **LONG})
        with pytest.raises(InfeasibleBudgetError, match=r"every block removed.*infeasible='clip'"):
            env.reset(options={"request": {**LONG, "budget_bytes": 10}})
        with pytest.raises(ResetNeeded):
            env.step(0)
        env.reset(seed=0)
        mask_before = env.step(0)[-1]["removed"]
        with pytest.raises(InfeasibleBudgetError):
            env.reset(options={"request": {**LONG, "budget_bytes": 10}})
        assert list(env.mask.names) == mask_before  # the running episode goes on

    def test_an_infeasible_budget_is_clipped_on_demand(self, workbench):
        env = make(workbench, infeasible="clip")
        options = {"request": {**LONG, "budget_bytes": 10}}
        _, info = env.reset(seed=0, options=options)
        assert info["infeasible"] == {"asked_budget_bytes": 10}
        assert info["request"]["budget_bytes"] == workbench.memory.least_peak_bytes(env.request)
        infos = [env.step(n)[-1] for n in range(COUNT - 1)]
        assert all("infeasible" in info for info in infos)
        _, _, terminated, _, info = env.step(COUNT - 1)
        assert terminated
        assert info["peak_bytes"] == env.request.budget_bytes
        assert "infeasible" not in env.reset(seed=0)[1]

    @pytest.mark.parametrize(
        ("request_", "error", "message"),
        [
            ({**LONG, "budget_byte": 5}, UnknownNameError, "setting of a request: 'budget_byte'"),
            ({"batch_size": 1}, InvalidRequestError, r"needs batch_size, .*\['batch_size'\]"),
            ({**LONG, "budget_bytes": 5, "budget_fraction": 0.5}, InvalidRequestError, "one of"),
            ({**LONG, "seq_len_tokens": 65, "budget_bytes": 5}, InvalidRequestError, "1 to 64"),
            ({**LONG, "batch_size": 0, "budget_fraction": 0.5}, InvalidRequestError, "not 0"),
            ({**LONG, "batch_size": "8", "budget_fraction": 0.5}, InvalidRequestError, "not '8'"),
            (Request(1, 65, 5), InvalidRequestError, "from 1 to 64 tokens"),
            ([1, 2, 3], InvalidRequestError, "must be a Request or a dict"),
        ],
    )
    def test_bad_requests_are_refused(self, workbench, request_, error, message):
        with pytest.raises(error, match=message):
            make(workbench).reset(options={"request": request_})

    def test_a_misspelt_option_is_refused(self, workbench):
        with pytest.raises(UnknownNameError, match="setting of reset: 'requests'"):
            make(workbench).reset(options={"requests": request_at(workbench)})


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "error", "message"),
        [
            ({"infeasible": "ignore"}, UnknownNameError, "'ignore'; known are 'clip', 'error'"),
            ({"render_mode": "human"}, UnknownNameError, "render mode 'human'; .*'rgb_array'"),
            ({"workload": "azure"}, UnknownNameError, "sampler 'azure'"),
            ({"reward": "speed"}, UnknownNameError, "reward 'speed'"),
            ({"invalid_action_penalty": -1}, InvalidRequestError, "0 or above, not -1"),
            ({"max_invalid_actions": 0}, InvalidRequestError, "at least 1, not 0"),
            ({"max_invalid_actions": 1.5}, InvalidRequestError, r"at least 1, not 1\.5"),
        ],
    )
    def test_impossible_settings_are_refused_when_made(self, workbench, settings, error, message):
        with pytest.raises(error, match=message):
            make(workbench, **settings)

    def test_a_misspelt_calibration_key_is_refused_before_a_model_loads(self):
        with pytest.raises(UnknownNameError, match=r"setting of the calibration: 'window'"):
            RAPPruneEnv("no-such-model", calibration={"window": 3})

    def test_make_takes_plain_values(self, tmp_path, monkeypatch):
        monkeypatch.setenv("RAP_CACHE_DIR", str(tmp_path / "cache"))
        tiny_model(layers=2).save_pretrained(tmp_path / "model")
        tiny_tokenizer().save_pretrained(tmp_path / "model")
        settings = {
            "model": str(tmp_path / "model"),
            "workload": {"name": "fixed", "batch_size": 8, "budget_fraction": 0.9},
            "reward": DENSE_TIMING,
            "calibration": {"windows": 2, "window_tokens": 8},
            "importance": "one_shot",
            "store": str(tmp_path / "scores.sqlite"),
        }
        env, twin = (gym.make("RAPPrune-v0", **settings) for _ in range(2))
        assert env.unwrapped.workbench is twin.unwrapped.workbench
        assert env.spec.kwargs == settings
        steps = play(env, 0, masked=True)
        assert steps[-1][2]
        assert (tmp_path / "scores.sqlite").exists()
        assert env.get_wrapper_attr("action_masks")().dtype == bool

    def test_the_docstring_is_a_complete_environment_page(self):
        text = RAPPruneEnv.__doc__
        for section in (
            "Description",
            "Observation Space",
            "Action Space",
            "Rewards",
            "Starting State",
            "Episode End",
            "Information",
            "Arguments",
            "Version History",
        ):
            assert f"## {section}\n" in text
        for index in (*range(5), *(f"[:, {n}]" for n in range(7)), "[i]"):
            assert f"| {index} |" in text


class TestRender:
    def test_text(self, workbench):
        env = make(workbench, render_mode="ansi")
        env.reset(seed=0, options={"request": request_at(workbench, 0.7)})
        assert "loss     +0.000 nats" in env.render()
        env.step(0)
        assert "attn     .##" in env.render()
        assert "measured when the episode ends" in env.render()

    def test_picture(self, workbench):
        env = make(workbench, render_mode="rgb_array", reward=DENSE_TIMING)
        env.reset(seed=0, options={"request": request_at(workbench, 0.7)})
        before = env.render()
        env.step(0)
        after = env.render()
        assert before.dtype == np.uint8
        assert before.shape == after.shape
        assert before.shape[2] == 3
        assert not np.array_equal(before, after)

    def test_without_a_mode_it_warns(self, workbench):
        env = make(workbench)
        env.reset(seed=0)
        with pytest.warns(UserWarning, match="render_mode"):
            assert env.render() is None

    def test_a_video_can_be_recorded(self, workbench, tmp_path):
        pytest.importorskip("moviepy")
        env = make(workbench, render_mode="rgb_array")
        with RecordVideo(env, str(tmp_path / "videos"), disable_logger=True) as recorded:
            play(recorded, 0, masked=True)
        (video,) = tmp_path.glob("videos/*.mp4")
        assert video.stat().st_size > 5000


def test_the_package_names_it():
    assert rap_env.RAPPruneEnv is RAPPruneEnv
