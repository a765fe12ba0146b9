"""Episodes of a pinned task as a Minari dataset."""

import minari
import numpy as np
import pytest

from experiments.export_minari import BEHAVIOURS, export
from experiments.study.errors import ExperimentError
from rap_env.errors import UnknownNameError
from rap_env.leaderboard.tasks import pinned_task

TASKS = ["RAPPrune/SmolLM2-Table-v1", "RAPLadder/SmolLM2-Table-v1"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))


@pytest.mark.parametrize("name", TASKS)
def test_a_dataset_replays_in_its_environment(name):
    export(pinned_task(name), "rap/test/mixed-v0", 8, BEHAVIOURS, 3)
    dataset = minari.load_dataset("rap/test/mixed-v0")
    assert dataset.total_episodes == 8
    env = dataset.recover_environment()
    assert env.spec.id == name
    returns = []
    for number, episode in enumerate(dataset.iterate_episodes()):
        observation, _ = env.reset(seed=3 + number)
        total = 0.0
        for step, action in enumerate(episode.actions):
            for key, array in observation.items():
                np.testing.assert_array_equal(array, episode.observations[key][step])
            observation, reward, terminated, truncated, _ = env.step(action)
            assert reward == episode.rewards[step]
            total += reward
        assert terminated
        assert episode.terminations[-1]
        assert not truncated
        returns.append(total)
    random, *chosen = (np.mean(returns[first::4]) for first in range(4))
    assert min(chosen) > random, "each other behaviour loses less than random actions"


def test_wrong_behaviours_and_existing_datasets_are_refused():
    task = pinned_task(TASKS[1])
    with pytest.raises(UnknownNameError, match="frontier"):
        export(task, "rap/test/mixed-v0", 1, ["best"], 0)
    export(task, "rap/test/mixed-v0", 1, ["random"], 0)
    with pytest.raises(ExperimentError, match="rap/test/mixed-v0 exists"):
        export(task, "rap/test/mixed-v0", 1, ["random"], 0)
