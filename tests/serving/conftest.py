"""Servers on free ports."""

from __future__ import annotations

import contextlib

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("openai", reason="the OpenAI client is not installed")


@contextlib.contextmanager
def served(engine, tokenizer, **settings):
    """A client's address of a server over an engine, and what its routes share."""
    from rap_env.serving.app import create_app
    from rap_env.serving.server import BackgroundServer
    from rap_env.serving.settings import ServerSettings

    given = {"model_name": "tiny", "shutdown_grace_s": 5.0, **settings}
    app = create_app(engine, tokenizer, ServerSettings(**given))
    with BackgroundServer(app) as server:
        server.service = app.state.service
        yield server


def client_of(server, **kwargs):
    """The OpenAI client."""
    from openai import OpenAI

    given = {"api_key": "none", "max_retries": 0, "timeout": 30, **kwargs}
    return OpenAI(base_url=f"{server.url}/v1", **given)


@pytest.fixture(scope="session")
def tokenizer():
    from tests.serving.tokenizers import chat_tokenizer

    return chat_tokenizer()
