"""``--help`` lists what a program reads, and a misspelt setting gets one sentence."""

from pathlib import Path

import pytest

from experiments.launch import (
    READS,
    _composed,
    _mistake,
    help_text,
    read_by,
    register_program,
)
from tests.programs import run_python

PROGRAMS = sorted({*READS, "long_context", "tight_grid"})


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_settings_in_the_help_of_a_program_exist(program):
    register_program(program)
    values, groups = _composed(program)
    assert "\n  name=" in help_text(read_by(program), values, groups)


def test_the_help_shows_the_values_that_the_command_gives(tmp_path):
    done = run_python("-m", "experiments.train", "experiment=table", "seed=3", "--help",
                      cwd=Path(__file__).parents[2])  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "experiments.train: train one agent" in done.stdout
    assert "model.name=score_table:smollm2-135m" in done.stdout
    assert "\n  seed=3\n" in done.stdout


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
    sentence = _mistake(text, "train")
    assert expected in sentence
    assert "\n" not in sentence
