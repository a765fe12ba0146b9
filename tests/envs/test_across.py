"""`RAPAcross-v0` on tiny models: each episode is one of `RAPLadder-v0` on one of them."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env
from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported

from agents.vector_env import GymVecEnv
from rap_env.errors import CorpusError, InvalidRequestError, UnknownNameError

MODELS = ["tiny-wide", "tiny-narrow", "tiny-even"]
LEVELS = {"weights": ["int8", "removed"], "embeddings": ["int8"]}  # no text makes them
ARGUMENTS = {
    "levels": LEVELS,
    "workload": {"name": "tight", "levels": LEVELS, "max_batch_size": 2, "seq_len_range": [8, 32]},
    "calibration": {"source": "tiny-held-out", "windows": 1, "window_tokens": 64},
    "importance": "none",
    "device": "cpu",
    "dtype": "float32",
    "store": None,
}


@pytest.fixture(scope="module", autouse=True)
def module_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAP_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def across():
    return gym.make("RAPAcross-v0", models=MODELS, **ARGUMENTS, disable_env_checker=True).unwrapped


def play(env, seed):
    rng = np.random.default_rng(seed)
    observation, info = env.reset(seed=seed)
    rewards, over = [], False
    while not over:
        action = rng.choice(np.flatnonzero(observation["action_mask"]))
        observation, reward, terminated, truncated, info = env.step(action)
        rewards.append(reward)
        over = terminated or truncated
    return rewards, info


@pytest.mark.parametrize(
    ("name", "given"), [("RAPPrune-v0", {}), ("RAPLadder-v0", {"levels": LEVELS})]
)
def test_a_tiny_model_needs_no_text_and_no_workload(name, given):
    env = gym.make(name, model="tiny-even", **given)
    assert env.unwrapped.context.scorer.corpus.provenance["source"] == "tiny-held-out"
    rewards, info = play(env, 0)
    assert info["peak_bytes"] <= info["request"]["budget_bytes"]
    assert -10 < rewards[-1] < 0
    with pytest.raises(CorpusError, match="tiny-even is too small .* give 'tiny-held-out'"):
        gym.make(name, model="tiny-even", calibration={"source": "self", "window_tokens": 64})


@pytest.mark.parametrize("models", [{}, {"models": []}, {"models": "tiny-deep"}])
def test_without_a_list_of_models_an_error_shows_one(models):
    with pytest.raises(InvalidRequestError, match="models must be a list of names"):
        gym.make("RAPAcross-v0", **models)


def test_it_is_an_environment(across):
    check_env(across, skip_render_check=True)


def test_each_reset_draws_one_of_the_models_and_a_seed_draws_the_same_episode(across):
    infos = [across.reset(seed=seed)[1] for seed in range(30)]
    assert {info["model"] for info in infos} == set(MODELS)
    assert [across.reset(seed=seed)[1] for seed in range(30)] == infos
    assert play(across, 3) == play(across, 3)


@pytest.mark.parametrize("seed", range(4))
def test_an_episode_is_one_of_the_drawn_model(across, seed):
    observation, info = across.reset(seed=seed)
    env = gym.make("RAPLadder-v0", model=info["model"], **ARGUMENTS)
    alone, _ = env.reset(options={"request": info["request"]})
    count = len(env.unwrapped.ladder)
    for name in ("ladder", "action_mask"):
        np.testing.assert_array_equal(observation[name][:count], alone[name])
        assert not observation[name][count:].any()
    np.testing.assert_array_equal(observation["request"], alone["request"])
    np.testing.assert_array_equal(across.action_masks()[:count], env.unwrapped.action_masks())
    for action in np.tile(np.flatnonzero(alone["action_mask"]), 2):
        _, *ours = across.step(action)
        _, *theirs = env.step(action)
        assert ours[:3] == theirs[:3]
        assert ours[3] == {**theirs[3], "model": info["model"]}
        if ours[1]:
            break
    assert theirs[1]


def test_actions_past_the_items_of_the_drawn_model_are_invalid(across):
    seed = next(s for s in range(40) if across.reset(seed=s)[1]["model"] == "tiny-wide")
    before, _ = across.reset(seed=seed)
    past = len(across.drawn.ladder)
    assert past < across.items
    for number in range(1, 11):
        after, reward, terminated, truncated, _ = across.step(past)
        assert not terminated
        assert truncated == (number == 10)
        assert truncated or reward == pytest.approx(-0.1)
    np.testing.assert_array_equal(after["ladder"], before["ladder"])
    across.reset(seed=seed)
    with pytest.raises(UnknownNameError):
        across.step(across.items)


def test_it_needs_a_reset_and_enough_rows():
    with pytest.raises(ResetNeeded):
        gym.make("RAPAcross-v0", models=MODELS, **ARGUMENTS).unwrapped.step(0)
    with pytest.raises(InvalidRequestError, match="items must be a whole number of at least 9"):
        gym.make("RAPAcross-v0", models=MODELS, items=3, **ARGUMENTS)


def test_with_a_number_of_rows_a_model_is_prepared_when_it_is_first_drawn():
    models = ["tiny-wide", "tiny-nowhere"]
    env = gym.make("RAPAcross-v0", models=models, items=15, **ARGUMENTS)
    assert env.reset(seed=1)[1]["model"] == "tiny-wide"
    with pytest.raises(UnknownNameError, match="tiny-nowhere"):
        env.reset(seed=0)
    with pytest.raises(UnknownNameError, match="tiny-nowhere"):
        gym.make("RAPAcross-v0", models=models, **ARGUMENTS)


def test_a_model_may_have_a_workload_of_its_own():
    own = {"name": "fixed", "batch_size": 2, "seq_len_tokens": 8, "budget_fraction": 0.7}
    env = gym.make("RAPAcross-v0", models=MODELS, workloads={"tiny-even": own}, **ARGUMENTS)
    requests = {}
    for seed in range(30):
        _, info = env.reset(seed=seed)
        requests.setdefault(info["model"], set()).add(tuple(info["request"].values()))
    assert len(requests["tiny-even"]) == 1 < len(requests["tiny-wide"])


@pytest.fixture(params=["NextStep", "SameStep"])
def vector(request):
    arguments = {**ARGUMENTS, "info": "arrays", "autoreset_mode": request.param}
    return gym.make_vec("RAPAcross-v0", models=MODELS, num_envs=7, items=15, **arguments)


def test_sub_environments_are_those_of_their_models(vector):
    part = vector.unwrapped.parts[2]
    alone = gym.make_vec(
        "RAPLadder-v0",
        model="tiny-even",
        num_envs=3,
        **{**ARGUMENTS, "info": "arrays"},
        autoreset_mode=vector.metadata["autoreset_mode"],
    )
    rows, count = slice(4, 7), len(part.ladder)
    ours, infos = vector.reset(seed=3)
    theirs, _ = alone.reset(seed=[7, 8, 9])
    assert infos["model"].tolist() == [
        name for n, name in zip((2, 2, 3), MODELS, strict=True) for _ in range(n)
    ]
    rng, ended = np.random.default_rng(0), 0
    for _ in range(40):
        assert vector.observation_space.contains(ours)
        np.testing.assert_array_equal(ours["ladder"][rows, :count], theirs["ladder"])
        np.testing.assert_array_equal(ours["request"][rows], theirs["request"])
        assert not ours["ladder"][rows, count:].any()
        masks = vector.unwrapped.action_masks()
        np.testing.assert_array_equal(masks, ours["action_mask"] > 0)
        actions = np.array([rng.choice(np.flatnonzero(mask)) for mask in masks])
        ours, rewards, terminated, truncated, infos = vector.step(actions)
        theirs, expected, over, _, others = alone.step(actions[rows])
        np.testing.assert_allclose(rewards[rows], expected, atol=1e-5)
        np.testing.assert_array_equal(terminated[rows], over)
        np.testing.assert_array_equal(infos["levels"][rows, :count], others["levels"])
        np.testing.assert_array_equal(infos["peak_bytes"][rows], others["peak_bytes"])
        assert not truncated.any()
        ended += over.sum()
        for seen in (each for each in infos.get("final_obs", ()) if each is not None):
            assert vector.single_observation_space.contains(seen)
    assert ended > 3


def test_agents_of_stable_baselines3_find_the_masks_of_a_vector(vector):
    if vector.metadata["autoreset_mode"] == gym.vector.AutoresetMode.SAME_STEP:
        envs = GymVecEnv(vector)
        envs.reset()
        assert is_masking_supported(envs)
        assert np.array_equal(get_action_masks(envs), vector.unwrapped.action_masks())


def test_in_a_vector_too_actions_past_the_items_of_a_model_are_invalid(vector):
    before, _ = vector.reset(seed=0)
    after, rewards, *_ = vector.step(np.full(7, 14))
    np.testing.assert_allclose(rewards, -0.1)
    np.testing.assert_array_equal(after["ladder"], before["ladder"])
    with pytest.raises(UnknownNameError):
        vector.step(np.full(7, 15))


def test_a_vector_has_a_sub_environment_for_each_model():
    with pytest.raises(InvalidRequestError, match="num_envs must be a whole number of at least 3"):
        gym.make_vec("RAPAcross-v0", models=MODELS, num_envs=2, **ARGUMENTS)
