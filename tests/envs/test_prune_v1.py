"""`RAPLadder-v0`: the contract of Gymnasium, the episodes, and that masks are those of v0."""

from __future__ import annotations

import itertools

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env, data_equivalence
from gymnasium.wrappers import FlattenObservation

import rap_env
from rap_env.envs.ladder import RAPLadderEnv
from rap_env.errors import (
    InfeasibleBudgetError,
    InvalidRequestError,
    NonFiniteScoreError,
    UnknownNameError,
)
from rap_env.ladder.observation import ITEM_FEATURES
from rap_env.plan import Plan
from rap_env.request import Request
from tests.envs.playing import COUNT, DENSE_TIMING, make, play
from tests.envs.playing_v1 import (
    ITEMS,
    LEVELS,
    LONG,
    long_request,
    make_ladder_context,
    make_v1,
)
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def ladder():
    return make_ladder_context()


class TestContract:
    @pytest.mark.parametrize("workload", ["fixed", "grid", "azure-conv"])
    def test_gymnasium_accepts_it(self, ladder, workload):
        env = make_v1(ladder, workload=workload, reward=DENSE_TIMING)
        check_env(env, skip_render_check=True, skip_close_check=True)

    @pytest.mark.filterwarnings("error", "ignore:.*unconventional shape:UserWarning")
    def test_stable_baselines_accepts_it(self, ladder):
        checker = pytest.importorskip("stable_baselines3.common.env_checker")
        checker.check_env(make_v1(ladder))

    def test_maskable_ppo_finds_the_masks(self, ladder):
        contrib = pytest.importorskip("sb3_contrib")
        env = make_v1(ladder, invalid_action_penalty=1e6)
        agent = contrib.MaskablePPO("MultiInputPolicy", env, n_steps=32, batch_size=16, seed=0)
        agent.learn(32)
        assert agent.rollout_buffer.rewards.min() > -1e5  # no invalid action was taken

    def test_it_flattens(self, ladder):
        env = FlattenObservation(make_v1(ladder))
        seen, _ = env.reset(seed=0)
        assert seen.shape == (5 + len(ITEM_FEATURES) * ITEMS + ITEMS,)
        assert env.observation_space.contains(seen)

    @pytest.mark.parametrize("reward", ["perplexity", DENSE_TIMING])
    def test_random_play_is_the_same_for_the_same_seed(self, ladder, reward):
        one, other = (make_v1(ladder, reward=reward, workload="azure-conv") for _ in range(2))
        for seed in range(5):
            first, second = play(one, seed), play(other, seed)
            assert data_equivalence(first, second)
            assert not data_equivalence(first[0], play(one, seed + 100)[0])

    def test_random_play_leaves_the_weights_as_they_were(self, ladder):
        weights = ladder.llm.model.state_dict()
        before = {name: tensor.clone() for name, tensor in weights.items()}
        play(make_v1(ladder, reward=DENSE_TIMING), 99)
        assert ladder.llm.plan == Plan()
        assert all(torch.equal(before[name], tensor) for name, tensor in weights.items())

    def test_the_package_exports_and_registers_it(self):
        assert rap_env.RAPLadderEnv is RAPLadderEnv
        spec = gym.spec("RAPLadder-v0")
        assert spec.entry_point == "rap_env.envs.ladder:RAPLadderEnv"
        assert spec.vector_entry_point == "rap_env.envs.ladder:RAPLadderVectorEnv"


SAME = ("peak_bytes", "request", "reward_terms", "nll")


class TestSameAsV0:
    """With weights native or removed and native caches, v1 has the episodes of v0."""

    @pytest.mark.parametrize(
        "reward", ["perplexity", DENSE_TIMING, {"name": "perplexity", "scale": "log"}], ids=str
    )
    @pytest.mark.parametrize(
        "workload", ["grid", "azure-conv", {"name": "curriculum", "requests": 5}], ids=str
    )
    @pytest.mark.parametrize("model", ["context", "repaired"])
    def test_masks_have_the_same_episodes(self, reward, workload, model, request):
        context = request.getfixturevalue(model)
        shared = {"reward": reward, "workload": workload}
        old, new = make(context, **shared), make_v1(context, levels="masks", **shared)
        assert old.action_space == new.action_space
        for seed in range(3):
            for masked in (False, True):
                expected, found = play(old, seed, masked), play(new, seed, masked)
                assert len(found) == len(expected)
                for (seen, *rest, info), (seen_v0, *rest_v0, info_v0) in zip(
                    found, expected, strict=True
                ):
                    assert rest == rest_v0  # rewards and ends
                    for key in SAME:
                        assert info.get(key) == info_v0.get(key)
                    assert info.get("delta_nll") == info_v0.get("loss")
                    assert np.array_equal(seen["action_mask"], seen_v0["action_mask"])
                    assert np.array_equal(seen["request"], seen_v0["request"])
                    freed = seen["ladder"][:, ITEM_FEATURES.index("freed_share")]
                    assert np.array_equal(freed, seen_v0["blocks"][:, 3])
                    removed = [n for n, level in enumerate(info["levels"]) if level == "removed"]
                    assert Plan.removing(*removed) == Plan.removing(*info_v0["removed"])

    def test_models_opened_by_name_have_the_same_episodes(self, tmp_path):
        tiny_model(layers=2).save_pretrained(tmp_path / "model")
        tiny_tokenizer().save_pretrained(tmp_path / "model")
        shared = {
            "model": str(tmp_path / "model"), "workload": "grid", "infeasible": "clip",
            "calibration": {"windows": 2, "window_tokens": 8}, "importance": "none",
        }  # fmt: skip
        old = gym.make("RAPPrune-v0", **shared)
        new = gym.make("RAPLadder-v0", levels="masks", **shared)
        for seed in range(5):
            for one, other in zip(play(old, seed), play(new, seed), strict=True):
                assert [one[-1].get(key) for key in SAME] == [other[-1].get(key) for key in SAME]
                assert one[1:-1] == other[1:-1]

    @pytest.mark.parametrize("request_", [{"batch_size": 8, "seq_len_tokens": 64}])
    def test_requests_and_errors_are_the_same(self, context, request_):
        settings = {"workload": {"name": "fixed", **request_}, "infeasible": "error"}
        for env in (make(context, **settings), make_v1(context, levels="masks", **settings)):
            with pytest.raises(InfeasibleBudgetError, match="infeasible='clip'"):
                env.reset(options={"request": {**request_, "budget_bytes": 10}})
            with pytest.raises(InvalidRequestError, match="model already fits"):
                env.reset(options={"request": {**request_, "budget_fraction": 1.0}})


class TestEpisode:
    @pytest.mark.parametrize("seed", range(8))
    def test_valid_actions_lower_items_until_the_request_fits(self, ladder, seed):
        env = make_v1(ladder, reward=DENSE_TIMING)
        (_, start), *steps = play(env, seed, masked=True)
        assert set(start["levels"]) == {"native"}
        request = Request(**start["request"])
        before = Plan()
        for seen, _, terminated, truncated, info in steps:
            plan = plan_of(env, info)
            changed = {k: v for k, v in plan.levels.items() if before.levels.get(k) != v}
            assert len(changed) == 1  # a removed block's cache is no longer named
            assert ladder.memory.peak_bytes(plan, request) == info["peak_bytes"]
            assert terminated == (info["peak_bytes"] <= request.budget_bytes)
            assert not truncated
            assert info["nll"] == pytest.approx(ladder.scorer.nll(plan))
            assert env.observation_space.contains(seen)
            before = plan
        assert steps[-1][2]
        assert env.plan == before

    def test_every_level_is_reached_one_by_one(self, ladder):
        env = make_v1(ladder)
        env.reset(seed=0, options={"request": long_request(ladder, 1e-6)})
        cache = env.ladder.numbers["layer00.cache"]
        reached = []
        while env.action_masks()[cache]:
            reached.append(env.step(cache)[-1]["levels"][cache])
        assert reached == LEVELS["caches"]
        *_, info = env.step(0), env.step(0), env.step(0)
        assert info[-1]["levels"][0] == info[-1]["levels"][cache] == "removed"
        assert env.plan.levels == {"layer00.attn": "removed"}
        _, reward, *_ = env.step(cache)
        assert reward == -0.1

    def test_levels_that_caches_take_together_need_one_action(self, ladder):
        env = make_v1(ladder, together=["int8", "int4"])
        env.reset(seed=0, options={"request": long_request(ladder, 1e-6)})
        numbers = env.ladder.numbers
        caches = [numbers[f"layer{n:02}.cache"] for n in range(3)]

        def lowered(item: str) -> list[str]:
            levels = env.step(numbers[item])[-1]["levels"]
            return [levels[n] for n in caches]

        assert lowered("layer01.cache") == ["int8"] * 3
        assert lowered("layer00.ffn") == ["int8"] * 3
        for _ in LEVELS["weights"]:
            levels = lowered("layer00.attn")
        assert levels == ["removed", "int8", "int8"]
        assert lowered("layer02.cache") == ["removed", "int4", "int4"]
        assert lowered("layer01.cache") == ["removed", "int4-window32", "int4"]
        assert env.action_masks()[caches].tolist() == [False, False, True]

    def test_budgets_reach_down_to_the_lowest_levels(self, ladder):
        env = make_v1(ladder, together=["int4"])
        _, info = env.reset(seed=0, options={"request": {**LONG, "budget_bytes": 10}})
        assert info["infeasible"] == {"asked_budget_bytes": 10}
        over = False
        while not over:
            _, _, over, _, info = env.step(int(env.action_masks().argmax()))
        assert info["peak_bytes"] == env.request.budget_bytes
        assert env.plan == env.ladder.lowest

    def test_requests_that_no_level_helps_are_rejected(self, ladder):
        env = make_v1(ladder, levels={"caches": ["int8"]}, importance="none")
        short = {"batch_size": 1, "seq_len_tokens": 20, "budget_fraction": 0.9}
        with pytest.raises(InvalidRequestError, match="no fewer bytes .* longer sequence"):
            env.reset(options={"request": short})
        fixed = {"name": "fixed", **short}
        blind = make_v1(ladder, levels={"caches": ["int8"]}, importance="none", workload=fixed)
        with pytest.raises(InvalidRequestError, match="None of the requests .* longer sequence"):
            blind.reset(seed=0)

    def test_both_timings_have_the_same_return(self, ladder):
        returns = []
        for reward in ("perplexity", DENSE_TIMING):
            steps = play(make_v1(ladder, reward=reward), 3)[1:]
            returns.append(sum(reward for _, reward, *_ in steps))
        assert returns[0] == pytest.approx(returns[1])

    def test_an_invalid_action_changes_nothing_and_costs(self, ladder):
        env = make_v1(ladder, invalid_action_penalty=0.25, levels="masks", max_invalid_actions=2)
        env.reset(seed=0, options={"request": long_request(ladder, 0.5)})
        seen, *_ = env.step(1)
        again, reward, terminated, truncated, _ = env.step(np.int64(1))
        assert data_equivalence(seen, again)
        assert (reward, terminated, truncated) == (-0.25, False, False)
        assert env.step(1)[2:4] == (False, True)
        with pytest.raises(ResetNeeded):
            env.step(0)

    def test_a_malformed_action_names_the_items(self, ladder):
        env = make_v1(ladder)
        env.reset(seed=0)
        with pytest.raises(UnknownNameError, match=r"0 \(layer00\.attn\) ... 9 \(embeddings\)"):
            env.step(ITEMS)

    def test_nan_from_the_model_does_not_change_the_episode(self):
        context = make_ladder_context()
        env = make_v1(context, reward=DENSE_TIMING)
        env.reset(seed=0, options={"request": long_request(context, 0.3)})
        head = context.llm.model.get_output_embeddings().weight
        env.step(1)
        kept = head.detach().clone()
        with torch.no_grad():
            head.fill_(torch.nan)
        with pytest.raises(NonFiniteScoreError, match="gave a non-finite NLL"):
            env.step(3)  # the one-shot scan did not measure both together
        assert env.plan.levels == {"layer00.ffn": "int8"}
        with torch.no_grad():
            head.copy_(kept)
        assert env.step(3)[-1]["levels"][:4] == ["native", "int8", "native", "int8"]

    def test_a_reward_can_be_relative_to_the_greedy_order(self, ladder):
        env = make_v1(ladder, reward={"name": "perplexity", "relative_to": "one_shot"})
        _, *steps = play(env, 1, masked=True)
        info = steps[-1][-1]
        steps_of_order = env._task._baseline(env._episode.start)
        assert info["baseline_delta_nll"] == pytest.approx(
            ladder.scorer.nll(steps_of_order) - ladder.scorer.dense_nll
        )
        assert steps[-1][1] == pytest.approx(info["baseline_delta_nll"] - info["delta_nll"])

    def test_a_reward_relative_to_an_order_that_is_left_out_is_rejected(self):
        blind = make_ladder_context(importance="none")
        with pytest.raises(InvalidRequestError, match="importance='none' leaves it out"):
            make_v1(blind, reward={"name": "perplexity", "relative_to": "gsi"})


class TestRendering:
    def test_text(self, ladder):
        env = make_v1(ladder, render_mode="ansi")
        env.reset(seed=0, options={"request": long_request(ladder, 0.3)})
        assert "cache" not in env.render()
        assert "of the native peak" in env.render()
        numbers = env.ladder.numbers
        for item in ("layer00.cache", "layer01.cache", "layer01.cache", "layer01.cache"):
            env.step(numbers[item])
        for item in ("layer00.ffn", "layer01.ffn", "layer01.ffn", "embeddings"):
            env.step(numbers[item])
        text = env.render()
        assert "ffn      84#" in text
        assert "cache    8w#" in text
        words = ("1 block int8", "1 block int4", "1 cache int8", "1 cache int4-window32")
        assert all(word in text for word in (*words, "embeddings int8"))

    def test_picture(self, ladder):
        env = make_v1(ladder, render_mode="rgb_array")
        env.reset(seed=0, options={"request": long_request(ladder, 0.3)})
        pictures = [env.render()]
        for item in ("layer00.cache", "layer00.ffn", "layer00.ffn"):
            env.step(env.ladder.numbers[item])
            pictures.append(env.render())
        for one, other in itertools.pairwise(pictures):
            assert one.shape == other.shape
            assert not np.array_equal(one, other)


def plan_of(env, info) -> Plan:
    levels = zip(env.ladder.items, info["levels"], strict=True)
    return Plan.of({i.name: n for i, n in levels if not (i.kind == "cache" and n == "removed")})


def test_the_number_of_actions_is_the_number_of_items(ladder):
    assert make_v1(ladder).action_space.n == ITEMS
    assert make_v1(ladder, levels="masks").action_space.n == COUNT
