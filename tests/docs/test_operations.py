"""Metrics in the dashboard, the alerts and the page are those of a server; its files agree."""

import json
import re
from pathlib import Path

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from rap_env.policies.loading import StaticPolicy
from rap_env.runtime.memory_limit import GivenMemory
from rap_env.runtime.memory_monitor import TensorMeter
from rap_env.serving.settings import ServerSettings
from rap_env.serving.stack import build_stack
from tests.serving.background import BackgroundServer
from tests.serving.tokenizers import chat_tokenizer
from tests.tiny import tiny_llm

FOLDER = Path(__file__).parents[2] / "docs" / "operations"
PAGE = (FOLDER / "index.md").read_text()
RULES = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"][0]["rules"]
PANELS = json.loads((FOLDER / "dashboard.json").read_text())["panels"]
QUERIES = [target["expr"] for panel in PANELS for target in panel.get("targets", ())]
EXPRESSIONS = [*QUERIES, *(rule["expr"] for rule in RULES)]

_NAME = re.compile(r"\b(?:rap|process)_\w+")
_SELECTOR = re.compile(r"\b((?:rap|process)_\w+)\{([^}]*)\}")
ELSEWHERE = {"rap_memory_other_bytes"}
"""Metrics that only a server with a limit of the whole process has."""
OF_PROMETHEUS = {"job", "instance", "le"}


@pytest.fixture(scope="module")
def exported():
    """Labels of all samples of a server that has answered a request, by their names."""
    llm = tiny_llm(tokenizer=chat_tokenizer())
    llm.set_residency("offload")
    stack = build_stack(
        ServerSettings(model_name="tiny"),
        llm=llm,
        policy=StaticPolicy((), "dense"),
        memory=GivenMemory(lambda: 10**9),
        meter=TensorMeter(llm),
    )
    with BackgroundServer(stack.app) as server:
        body = {"model": "tiny", "prompt": "a", "max_tokens": 3}
        assert httpx.post(f"{server.url}/v1/completions", json=body).status_code == 200
        text = httpx.get(f"{server.url}/metrics").text
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    return {s.name: set(s.labels) for s in samples if not s.name.endswith("_created")}


def test_every_metric_of_an_expression_is_exported(exported):
    assert len(EXPRESSIONS) > 40
    for expression in EXPRESSIONS:
        assert set(_NAME.findall(expression)) <= exported.keys(), expression


def test_every_label_of_an_expression_belongs_to_its_metric(exported):
    for expression in EXPRESSIONS:
        for name, selector in _SELECTOR.findall(expression):
            labels = set(re.findall(r"(\w+)\s*[=!]", selector))
            assert labels <= exported[name] | OF_PROMETHEUS, expression
        for grouped in re.findall(r"\bby \(([^)]*)\)", expression):
            known = set().union(*(exported[name] for name in _NAME.findall(expression)))
            assert set(re.findall(r"\w+", grouped)) <= known | OF_PROMETHEUS, expression


def test_the_page_describes_every_metric_of_the_server_and_no_other(exported):
    described = {name for name in _NAME.findall(PAGE) if not name.endswith("_")}
    short = {re.sub(r"_(bucket|sum|count)$", "", name) for name in exported}
    own = {name for name in short if name.startswith("rap_")}
    assert own <= described
    assert described - ELSEWHERE <= short
