"""A harness with plenty of memory and its engine."""

import pytest

from tests.runtime.harness import Harness


@pytest.fixture
def harness():
    return Harness()


@pytest.fixture
def engine(harness):
    return harness.engine()
