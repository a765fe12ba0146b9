"""Fixtures of every test: no network, and a separate cache folder."""

import gc
import os
import zlib

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # before any import

import pytest

AGENTS = ("ppo", "maskable_ppo", "dqn", "masked_dqn")

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
    """Add the options of this project's tests."""
    what = "write what the tests with the mark engine_feature showed, as the documentation reads it"
    parser.addoption("--engine-features", metavar="PATH", help=what)
    what = "run tests of every model family or agent on all of them, not on some in turn"
    parser.addoption("--all-cases", action="store_true", help=what)


def pytest_collection_modifyitems(config, items):
    """Choose cases, and attach to each test what it shows of an engine for its report."""
    everything = ("--all-cases", "--engine-features", "keyword")
    if not any(config.getoption(name) for name in everything):
        left_out = cases_left_out(items)
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=list(left_out))
    for item in items:
        for mark in item.iter_markers("engine_feature"):
            item.user_properties.append(("engine_feature", list(mark.args)))


def cases_left_out(items):
    """The cases to leave out so that each test runs on every fourth family and every second agent.

    Tests start at different ones, chosen by a hash of their name, so that each family passes about
    a quarter of the tests, always the same.
    """
    cases = {}
    for item in items:
        name, every = taken_in_turn(item)
        if name:
            test = item.nodeid.partition("[")[0]
            cases.setdefault((test, every), {}).setdefault(name, []).append(item)
    return {
        item
        for (test, every), by_name in cases.items()
        if len(by_name) >= every
        for rank, found in enumerate(by_name.values(), start=zlib.crc32(test.encode()))
        if rank % every
        for item in found
    }


def taken_in_turn(item):
    """The family or agent that a test's case runs on, and of how many of them it runs on one."""
    from tests.tiny import FAMILIES

    for value in item.callspec.params.values() if hasattr(item, "callspec") else ():
        if isinstance(value, str) and value in FAMILIES:
            return value, 4
        if isinstance(value, str) and value in AGENTS:
            return value, 2
    return None, 0


def pytest_configure(config):
    """Keep the outcomes for the record, in the process that writes it."""
    path = config.getoption("--engine-features", None)
    if path and not hasattr(config, "workerinput"):
        from tests.engine_features import FeatureRecord

        config.pluginmanager.register(FeatureRecord(path))
