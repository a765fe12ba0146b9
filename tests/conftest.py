"""Fixtures of every test: no network, and a separate cache folder."""

import gc
import itertools
import os
import zlib

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # before any import
os.environ.pop("RAP_CACHE_DIR", None)

import hypothesis
import pytest

AGENTS = ("ppo", "maskable_ppo", "dqn", "masked_dqn")

hypothesis.settings.register_profile(
    "untimed",
    deadline=None,
    suppress_health_check=[
        hypothesis.HealthCheck.too_slow,
        hypothesis.HealthCheck.data_too_large,
        hypothesis.HealthCheck.function_scoped_fixture,
    ],
)
hypothesis.settings.load_profile("untimed")

gc.disable()  # until all tests are collected: what an import makes, stays


@pytest.fixture(scope="session")
def caches(tmp_path_factory):
    """Names of new folders; pytest's own way to find one looks through all earlier ones."""
    folder = tmp_path_factory.mktemp("caches")
    return (str(folder / str(number)) for number in itertools.count())


@pytest.fixture(autouse=True)
def own_cache(caches, monkeypatch):
    """A separate cache folder for each test, unless a fixture has set one for all of a module."""
    if "RAP_CACHE_DIR" not in os.environ:
        monkeypatch.setenv("RAP_CACHE_DIR", next(caches))


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """A cache of all workers, in which what the package's tiny models need is made once."""
    folder = tmp_path_factory.getbasetemp()
    return (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "tiny-models"


def pytest_collection_finish() -> None:
    """Leave all modules out of later garbage collections."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True, scope="module")
def quick_collections():
    """Leave what exists out of later garbage collections, which take 0.3 seconds with it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A saved model of four layers with a tokenizer that has a chat template."""
    from tests.serving.tokenizers import chat_tokenizer
    from tests.tiny import tiny_model

    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_model(layers=4).save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    return folder


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
    what = "run tests of every model family or agent on all of them, not on some in turn"
    parser.addoption("--all-cases", action="store_true", help=what)


def pytest_collection_modifyitems(config, items):
    """Choose cases."""
    if not any(config.getoption(name) for name in ("--all-cases", "keyword")):
        left_out = cases_left_out(items)
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=list(left_out))


def cases_left_out(items):
    """The cases to leave out so that each test runs on every sixth family and on one agent.

    Tests start at different ones, chosen by a hash of their name, so that each family passes about
    a sixth of the tests, always the same. A test that names few families runs on all of them.
    """
    cases = {}
    for item in items:
        name, least, every = taken_in_turn(item)
        if name:
            test = item.nodeid.partition("[")[0]
            cases.setdefault((test, least, every), {}).setdefault(name, []).append(item)
    return {
        item
        for (test, least, every), by_name in cases.items()
        if len(by_name) >= least
        for rank, found in enumerate(by_name.values(), start=zlib.crc32(test.encode()))
        if rank % min(every, len(by_name))
        for item in found
    }


def taken_in_turn(item):
    """The family or agent of a case, how many a test must name, and of how many it runs on one."""
    from tests.tiny import FAMILIES

    for value in item.callspec.params.values() if hasattr(item, "callspec") else ():
        if isinstance(value, str) and value in FAMILIES:
            return value, 4, 6
        if isinstance(value, str) and value in AGENTS:
            return value, 2, 4
    return None, 0, 0
