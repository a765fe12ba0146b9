"""``--help`` lists groups and settings, and a misspelt setting gets one sentence."""

from pathlib import Path

import pytest

from experiments.launch import _mistake, register_program
from tests.programs import run_python


def test_the_help_shows_the_values_that_the_command_gives():
    done = run_python("-m", "experiments.train", "experiment=table", "seed=3", "--help",
                      cwd=Path(__file__).parents[2])  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "agent: dqn, maskable_ppo, maskable_ppo_large" in done.stdout
    assert "name: score_table:smollm2-135m" in done.stdout
    assert "\nseed: 3\n" in done.stdout


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Could not override 'agent.total_timestep'.", "Did you mean 'agent.total_timesteps'?"),
        ("Could not override 'agnet'.", "Did you mean 'agent'?"),
        ("Could not override 'total_timesteps'.", "Did you mean 'agent.total_timesteps'?"),
        ("In 'config': Could not find 'agent/ppp'\n\nAvailable options in 'agent':\n\tdqn\n\tppo\n"
         "Config search path:", "Unknown option of agent 'ppp'; known are 'dqn', 'ppo'."),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_with_the_nearest_name(text, expected):
    register_program("train")
    sentence = _mistake(text, "train")
    assert expected in sentence
    assert "\n" not in sentence
