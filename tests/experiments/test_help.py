"""``--help`` lists what a program reads, and a misspelt setting gets one sentence."""

from pathlib import Path

import pytest

from experiments.config import Config
from experiments.launch import _composed, _mistake, register_program
from experiments.study.help import READS, described, guess, help_text, settings_of
from tests.programs import run_python

PROGRAMS = sorted({*READS, "levels", "long_context", "tight_grid"})
MOST_LINES = 80


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_help_of_a_program_is_short_and_its_settings_exist(program):
    register_program(program)
    values, groups = _composed(program)
    lines = help_text(settings_of(program), Config, values, groups).splitlines()
    assert len(lines) <= MOST_LINES - 4, "the program's name and usage come before"
    assert "  name=" in "\n".join(lines)


def test_settings_have_a_sentence():
    values, groups = _composed("train")
    lines = help_text(settings_of("train"), Config, values, groups).splitlines()
    (steps,) = [line for line in lines if line.startswith("  agent.total_timesteps=")]
    assert steps.split(maxsplit=1) == [
        "agent.total_timesteps=20000", "Steps of the environment until the training ends",
    ]  # fmt: skip
    (teacher,) = [line for line in lines if line.startswith("  warm_start.requests=")]
    assert teacher.endswith("workload requests that the teacher answers")
    words = dict(described(Config))
    for name in ("agent", "calibration", "env", "importance", "logger", "model", "score_model"):
        assert all(words[f"{name}.{key}"] for key in values[name])


def test_the_help_shows_the_values_that_the_command_gives(tmp_path):
    done = run_python("-m", "experiments.train", "experiment=table", "seed=3", "--help",
                      cwd=Path(__file__).parents[2])  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "experiments.train: train one agent" in done.stdout
    assert "model.name=score_table:smollm2-135m" in done.stdout
    assert "  seed=3 " in done.stdout
    assert len(done.stdout.splitlines()) <= MOST_LINES


def test_the_usage_names_the_module_that_runs():
    module = "experiments.studies.prompts"
    done = run_python("-m", module, "--help", cwd=Path(__file__).parents[2])
    assert f"Usage: python -m {module} [SETTING=VALUE ...]" in done.stdout, done.stderr


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


def test_a_setting_that_resembles_nothing_is_named():
    assert guess("zzz", {"seed": 0}, []).startswith("There is no setting 'zzz'. --help")
