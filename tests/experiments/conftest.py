"""Folders of a file of tests."""

import pytest

from tests.experiments.synthetic_records import write_root


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with the cache of all tests of a file."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAP_CACHE_DIR", str(folder / "cache"))
        yield folder


@pytest.fixture(scope="module")
def root(base):
    """The invented records of a comparison, with two seeds of the agent."""
    return write_root(base / "syn", agent_seeds=2)
