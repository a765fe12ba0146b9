"""A harness with plenty of memory and its engine."""

from __future__ import annotations

import pytest

from tests.runtime.harness import Harness


@pytest.fixture
def harness():
    return Harness()


@pytest.fixture
def engine(harness):
    return harness.engine()
