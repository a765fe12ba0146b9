"""Limits that cannot be are named, and so is a package that is not there."""

from __future__ import annotations

import importlib
import importlib.util

import pytest

import rap_env.serving
from rap_env.errors import MissingDependencyError, ServingSettingsError
from rap_env.serving.server import bind, url_of
from rap_env.serving.settings import ServingSettings


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"max_body_bytes": 0}, "max_body_bytes must be at least 1, not 0"),
        ({"max_choices": -1}, "max_choices"),
        ({"max_prompt_tokens": 0}, "max_prompt_tokens"),
        ({"body_timeout_s": 0}, "body_timeout_s must be above 0 seconds"),
        ({"shutdown_grace_s": float("nan")}, "shutdown_grace_s"),
    ],
)
def test_a_limit_that_cannot_be_is_named(wrong, words):
    with pytest.raises(ServingSettingsError, match=words):
        ServingSettings("tiny", **wrong)


@pytest.mark.parametrize("module", ["fastapi", "uvicorn", "prometheus_client", "jinja2"])
def test_a_missing_package_is_named_with_its_extra(module, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == module else find(name)
    )
    with pytest.raises(MissingDependencyError, match=r"rap-env\[serve\]"):
        importlib.reload(rap_env.serving)


def test_an_address_is_taken_once():
    with bind("127.0.0.1", 0) as first:
        first.listen()
        port = first.getsockname()[1]
        assert url_of(first) == f"http://127.0.0.1:{port}"
        with pytest.raises(ServingSettingsError, match=f"127.0.0.1:{port}.*another port"):
            bind("127.0.0.1", port)


@pytest.mark.parametrize(("host", "port"), [("no.such.host.invalid", 80), ("127.0.0.1", 99999)])
def test_an_address_that_is_none_is_named(host, port):
    with pytest.raises(ServingSettingsError, match=f"Cannot listen at {host}:{port}"):
        bind(host, port)
