"""The environment on a model whose removed blocks leave stubs behind."""

from __future__ import annotations

import itertools

import gymnasium as gym
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

from rap_env.envs.prune import RAPPruneEnv
from rap_env.errors import ArtifactError, UnknownNameError
from rap_env.models.files.loading import shared_llm
from rap_env.plan import Plan
from rap_env.request import Request
from tests.envs.conftest import tiny_library
from tests.envs.playing import DENSE_TIMING, assert_same, make, play, request_at
from tests.envs.playing_vectors import make_sync, make_vector, play_vector
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.mark.parametrize("workload", ["fixed", "grid", "azure-conv"])
def test_gymnasium_accepts_it(repaired, workload):
    env = make(repaired, workload=workload, reward=DENSE_TIMING)
    check_env(env, skip_render_check=True, skip_close_check=True)


def test_spaces_and_info_are_those_without_stubs(context, repaired):
    plain, stubs = make(context), make(repaired)
    assert stubs.observation_space == plain.observation_space
    assert stubs.action_space == plain.action_space
    ends = [play(env, 3, masked=True)[-1][-1] for env in (plain, stubs)]
    assert ends[0].keys() == ends[1].keys()


def test_the_dense_model_is_the_same_one(context, repaired):
    (_, plain), (_, stubs) = (
        make(each).reset(seed=0, options={"request": request_at(each, 0.7)})
        for each in (context, repaired)
    )
    assert stubs == plain  # no block is removed, so no stub is active


@pytest.mark.parametrize("seed", range(5))
def test_the_bytes_of_stubs_count_until_the_request_fits(repaired, seed):
    env = make(repaired, reward=DENSE_TIMING)
    (_, start), *steps = play(env, seed, masked=True)
    request = Request(**start["request"])
    for _, _, terminated, _, info in steps:
        mask = Plan.removing(*info["removed"])
        parts = repaired.memory.breakdown(mask, request)
        assert (
            parts.stubs
            == sum(repaired.memory.facts.stub_bytes[index] for index in sorted(mask.removed))
            > 0
        )
        assert info["peak_bytes"] == parts.peak
        assert terminated == (parts.peak <= request.budget_bytes)
    peaks = [start["peak_bytes"], *(info["peak_bytes"] for *_, info in steps)]
    assert all(after < before for before, after in itertools.pairwise(peaks))


def test_freed_bytes_in_observations_exclude_the_stub(context, repaired):
    request = request_at(context, 0.7)
    plain, stubs = (
        make(each).reset(seed=0, options={"request": request})[0]["blocks"][:, 3]
        for each in (context, repaired)
    )
    dense = context.memory.dense_peak_bytes(request.batch_size, request.seq_len_tokens)
    lost = [count / dense for count in repaired.memory.facts.stub_bytes]
    assert plain - stubs == pytest.approx(lost, abs=1e-6)


def test_rewards_are_those_of_the_model_with_stubs(context, repaired):
    options = {"request": request_at(context, 0.8)}
    found = {}
    for each in (context, repaired):
        env = make(each, reward=DENSE_TIMING)
        env.reset(seed=0, options=options)
        *_, info = env.step(1)
        found[each] = info["nll"]
        assert info["nll"] == each.scorer.nll(Plan.removing(1))
    assert found[context] != found[repaired]


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_sub_environments_are_single_environments_side_by_side(repaired, mode):
    settings = {"reward": DENSE_TIMING, "workload": "azure-conv"}
    expected = play_vector(make_sync(repaired, mode, **settings), 1)
    found = play_vector(make_vector(repaired, autoreset_mode=mode, **settings), 1)
    for one, other in zip(found, expected, strict=True):
        for array in ("request", "blocks", "action_mask"):
            assert_same(one[0][array], other[0][array])
        assert_same(one[1:-1], other[1:-1])
        for key in ("peak_bytes", "removed", "request"):
            assert_same(one[-1][key], other[-1][key])


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """Plain values that `make` takes, of a model in a folder."""
    monkeypatch.setenv("RAP_CACHE_DIR", str(tmp_path / "cache"))
    tiny_model(layers=2).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return {
        "model": str(tmp_path / "model"),
        "dtype": "float32",
        "workload": {"name": "fixed", "batch_size": 8, "budget_fraction": 0.9},
        "calibration": {"windows": 2, "window_tokens": 8},
        "importance": "one_shot",
        "store": str(tmp_path / "scores.sqlite"),
    }


def test_make_accepts_names_and_a_path(settings, tmp_path):
    plain = gym.make("RAPPrune-v0", **settings)
    assert plain.unwrapped.memory.facts.repair == ""
    fitted = gym.make("RAPPrune-v0", repair="library", **settings)
    again = gym.make_vec("RAPPrune-v0", num_envs=2, repair="library", **settings)
    assert fitted.spec.kwargs["repair"] == "library"
    assert again.context is fitted.unwrapped.context
    mine = tiny_library(shared_llm(settings["model"], dtype="float32"))
    mine.save(tmp_path / "mine.safetensors")
    own = gym.make("RAPPrune-v0", repair=str(tmp_path / "mine.safetensors"), **settings)
    assert own.unwrapped.memory.facts.repair == mine.sha256
    hashes = {env.unwrapped.memory.facts.repair for env in (plain, fitted, own)}
    assert len(hashes) == 3
    assert play(fitted, 0, masked=True)[-1][2]


def test_errors_name_the_wrong_value(settings, tmp_path):
    with pytest.raises(UnknownNameError, match="repair 'libary'.*Did you mean 'library'"):
        RAPPruneEnv(repair="libary", **settings)
    other = tmp_path / "other.safetensors"
    tiny_library(shared_llm(settings["model"], dtype="bfloat16")).save(other)
    with pytest.raises(ArtifactError, match="fitted on .* another dtype"):
        RAPPruneEnv(repair=str(other), **settings)


def test_the_page_documents_it():
    assert '| `repair` | `"none"` |' in RAPPruneEnv.__doc__
