"""Fixtures of every test: no network, and a separate cache folder."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # before any import

import pytest

gc.disable()  # until all tests are collected: what an import makes, stays


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """A separate cache folder for each test, so that tests do not share files."""
    monkeypatch.setenv("RAP_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


def pytest_collection_finish() -> None:
    """Leave all modules out of later garbage collections."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True, scope="module")
def quick_collections():
    """Leave what exists out of later garbage collections, which take 0.3 seconds with it."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def rap(capsys, monkeypatch, tmp_path):
    """Runs the command; gives its exit code and what it wrote."""
    from rap_env.cli import main

    monkeypatch.setenv("RAP_CACHE_DIR", str(tmp_path / "cache"))

    def run(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        found = capsys.readouterr()
        return ended.value.code, found.out, found.err

    return run


def pytest_addoption(parser):
    """Add the option that records which engine can do what."""
    what = "write what the tests with the mark engine_feature showed, as the documentation reads it"
    parser.addoption("--engine-features", metavar="PATH", help=what)


def pytest_collection_modifyitems(items):
    """Attach to each test what it shows of an engine, so that its report has it."""
    for item in items:
        for mark in item.iter_markers("engine_feature"):
            item.user_properties.append(("engine_feature", list(mark.args)))


def pytest_configure(config):
    """Keep the outcomes for the record, in the process that writes it."""
    path = config.getoption("--engine-features", None)
    if path and not hasattr(config, "workerinput"):
        from tests.engine_features import FeatureRecord

        config.pluginmanager.register(FeatureRecord(path))
