"""The folder of a file of tests."""

import pytest


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with the cache of all tests of a file."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAP_CACHE_DIR", str(folder / "cache"))
        yield folder
