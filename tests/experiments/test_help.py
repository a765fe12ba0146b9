"""``--help`` lists groups and settings, and a misspelt setting is named."""

from pathlib import Path

import pytest

from tests.programs import run_python


def test_the_help_shows_the_values_that_the_command_gives():
    done = run_python("-m", "experiments.train", "experiment=table", "seed=3", "--help",
                      cwd=Path(__file__).parents[2])  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "agent: dqn, maskable_ppo, maskable_ppo_large" in done.stdout
    assert "name: score_table:smollm2-135m" in done.stdout
    assert "\nseed: 3\n" in done.stdout


@pytest.mark.parametrize(
    ("program", "wrong"),
    [("experiments.explorer", "x"), ("tools.tiny_models", "x"),
     ("tools.bounded_table", "smollm2")],
)  # fmt: skip
def test_programs_without_settings_write_nothing_when_asked_for_help(program, wrong):
    for argument, code, expected in (("--help", 0, "--help"), (wrong, 2, wrong)):
        done = run_python("-m", program, argument, cwd=Path(__file__).parents[2])
        assert done.returncode == code
        assert expected in done.stdout + done.stderr
        assert "Traceback" not in done.stderr


def test_a_mistake_is_named_without_a_traceback():
    done = run_python("-m", "experiments.train", "agent=ppp", cwd=Path(__file__).parents[2])
    assert done.returncode == 2
    assert done.stderr.startswith("Error: ")
    assert "Available options in 'agent':\n\tdqn\n" in done.stderr
    assert "--help lists the settings" in done.stderr
    assert "Traceback" not in done.stderr
