"""Both tasks return what they have always returned, to the byte: see `tests.envs.golden`."""

import pytest

from tests.envs import golden

CASES = [(task, model) for task, models in golden.VARIANTS.items() for model in models]


@pytest.fixture(scope="module")
def recorded():
    return golden.load()


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 7])
@pytest.mark.parametrize(("task", "model"), CASES)
def test_episodes(recorded, task, model, every):
    expected = recorded[task]["episodes"][model][::every]
    assert golden.episodes(task, model, every) == expected


@pytest.mark.parametrize(("task", "model"), CASES)
def test_vector_episodes(recorded, task, model):
    assert golden.vector_episodes(task, model) == recorded[task]["vectors"][model]


@pytest.mark.parametrize("task", golden.VARIANTS)
def test_errors(recorded, task):
    seen = golden.errors(task)
    assert "no error" not in seen.values()
    assert seen == recorded[task]["errors"]
