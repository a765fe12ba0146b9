"""Servers on free ports."""

import contextlib

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("openai", reason="the OpenAI client is not installed")


HI = [{"role": "user", "content": "hi"}]


@contextlib.contextmanager
def served(engine, tokenizer, **settings):
    """A client's address of a server over an engine, and what its routes share."""
    from rap_env.serving.app import create_app
    from rap_env.serving.settings import ServerSettings
    from tests.serving.background import BackgroundServer

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


def tiny_stack(tokenizer, policy_of, read_budget, **settings):
    """A whole server of a tiny model, with a policy of its memory and a budget that moves."""
    from rap_env.memory import MemoryModel
    from rap_env.runtime.memory_limit import GivenMemory
    from rap_env.runtime.memory_monitor import TensorMeter
    from rap_env.serving.settings import ServerSettings
    from rap_env.serving.stack import build_stack
    from tests.tiny import tiny_llm

    llm = tiny_llm(layers=3, tokenizer=tokenizer)
    llm.set_residency("offload")
    stack = build_stack(
        ServerSettings(model_name="tiny", shutdown_grace_s=5.0, **settings),
        llm=llm,
        policy=policy_of(MemoryModel(llm)),
        memory=GivenMemory(read_budget),
        meter=TensorMeter(llm),
    )
    stack.engine.controller.headroom.hold_s = 0.0
    return stack


def dense_engine(llm, **settings):
    """A real engine that has memory for everything."""
    from rap_env.plan import Plan
    from rap_env.policies.loading import StaticPolicy
    from rap_env.runtime.controller import RuntimeController
    from rap_env.runtime.engine import Engine
    from rap_env.runtime.memory_monitor import TensorMeter
    from rap_env.runtime.records import EngineSettings

    policy = StaticPolicy(Plan(), "dense")
    controller = RuntimeController(llm, policy, lambda: 10**9, meter=TensorMeter(llm))
    return Engine(controller, EngineSettings(**settings))


def chat(client, **more):
    """A greedy answer to one message."""
    asked = {"model": "tiny", "messages": HI, "temperature": 0, "max_tokens": 10, **more}
    return client.chat.completions.create(**asked)


@pytest.fixture(scope="session")
def tokenizer():
    from tests.serving.tokenizers import chat_tokenizer

    return chat_tokenizer()


@pytest.fixture(scope="module")
def server(tokenizer):
    """A server over a fake engine that says "hello world"."""
    from tests.serving.fake_engine import FakeEngine

    with served(FakeEngine(tokenizer, "hello world"), tokenizer) as opened:
        yield opened
