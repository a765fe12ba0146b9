"""Errors list known names and can be pickled."""

import pickle

import pytest

from rap_env.errors import MissingDependencyError, RapError, UnknownNameError


def test_an_unknown_name_lists_the_known_and_guesses():
    error = UnknownNameError("sampler", "gird", ["grid", "fixed"], "See the documentation.")
    assert str(error) == (
        "Unknown sampler 'gird'; known are 'fixed', 'grid'. Did you mean 'grid'? "
        "See the documentation."
    )
    assert isinstance(error, RapError | ValueError)


def test_a_missing_package_names_the_install_command():
    assert 'pip install "rap-env[eval]"' in str(MissingDependencyError("lm-eval", "A task", "eval"))


@pytest.mark.parametrize(
    "error",
    [UnknownNameError("task", "x", iter(["a", "b"])), MissingDependencyError("p", "F", "e")],
)
def test_errors_can_be_pickled(error):
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
