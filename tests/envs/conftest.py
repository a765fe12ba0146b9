"""Contexts and both tasks on them."""

import pytest

from rap_env.context.base import PruningContext
from tests.envs.playing import Task, ladder_task, prune_task
from tests.envs.tiny_contexts import make_context, make_ladder_context


@pytest.fixture(scope="session")
def context() -> PruningContext:
    return make_context()


@pytest.fixture(scope="session")
def ladder() -> PruningContext:
    """A model with all levels."""
    return make_ladder_context()


@pytest.fixture(scope="session", params=["prune", "ladder"])
def task(request) -> Task:
    """Each of the two environments."""
    if request.param == "prune":
        return prune_task(request.getfixturevalue("context"))
    return ladder_task(request.getfixturevalue("ladder"))
