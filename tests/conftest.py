"""What holds for every test: no network, and nobody else's cache."""

import os

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # before any import

import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """A cache folder of its own for each test, so that none finds or leaves files elsewhere."""
    monkeypatch.setenv("RAP_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
