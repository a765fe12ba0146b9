"""Limits on the memory of the process or of the model: checked early, then kept and reported."""

from __future__ import annotations

import sys

import pytest
from prometheus_client.parser import text_string_to_metric_families

from rap_env.errors import ServingSettingsError
from rap_env.models.files import loading
from rap_env.runtime.memory_meter import TensorMeter, resident_bytes
from rap_env.runtime.process_memory import ProcessMemory
from rap_env.serving import memory_limit
from rap_env.serving.settings import ServerSettings
from rap_env.serving.stack import build_stack, greeting
from tests.tiny import tiny_llm, tiny_model

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
MIB = 2**20


def gauges(stack):
    """Values in the metrics by name and labels."""
    text = stack.app.state.service.metrics.render().decode()
    families = text_string_to_metric_families(text)
    samples = [sample for family in families for sample in family.samples]
    return {(sample.name, *sample.labels.values()): sample.value for sample in samples}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("model") / "tiny"
    tiny_model().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@linux
def test_a_process_that_cannot_start_within_its_limit_does_not_read_the_weights(
    folder, monkeypatch
):
    monkeypatch.setattr(loading, "load_weights", lambda *_: pytest.fail("weights were read"))
    need = resident_bytes()[1]
    with pytest.raises(
        ServingSettingsError, match=r"memory is 1MiB, .* needs (\d+)MiB to"
    ) as found:
        build_stack(ServerSettings(model=folder, memory="1MiB", policy="dense"))
    stated = int(str(found.value).partition("needs ")[2].partition("MiB")[0])
    assert stated * MIB > need


@linux
def test_the_server_starts_within_a_limit_that_is_large_enough_and_reports_it(folder):
    limit = resident_bytes()[0] + 2**30  # other tests have raised the mark
    settings = ServerSettings(model=folder, memory=limit, policy="dense", dtype="float32")
    stack = build_stack(settings)
    monitor = stack.engine.controller.monitor
    source = monitor.source
    assert isinstance(source, ProcessMemory)
    assert source.process_bytes == limit
    assert monitor.budget_bytes < limit - source.other_bytes < limit
    whole = f"at most {-(-limit // MIB)}MiB for the whole process"
    assert whole in greeting(stack, "http://here")
    found = gauges(stack)
    assert found["rap_memory_limit_bytes", "process"] == limit
    assert found["rap_memory_other_bytes",] == source.other_bytes


@linux
def test_a_start_that_took_more_than_the_limit_ends(tokenizer):
    settings = ServerSettings(memory=resident_bytes()[0] // 2)
    with pytest.raises(ServingSettingsError, match=r"the process took \d+MiB to start"):
        memory_limit.check_started(settings, memory_limit.open_limit(settings))
    llm = tiny_llm(tokenizer=tokenizer)
    settings = ServerSettings(memory=resident_bytes()[1] // 2, policy="dense")
    with pytest.raises(ServingSettingsError, match=r"memory must be at least \d+MiB .* not"):
        build_stack(settings, llm=llm)


def test_a_limit_of_the_model_is_reported_as_such(tokenizer):
    llm = tiny_llm(tokenizer=tokenizer)
    settings = ServerSettings(model_memory="64MiB", policy="dense")
    stack = build_stack(settings, llm=llm, meter=TensorMeter(llm))
    assert "Memory: at most 64MiB for the model now" in greeting(stack, "http://here")
    found = gauges(stack)
    assert found["rap_memory_limit_bytes", "model"] == 64 * MIB
    assert ("rap_memory_other_bytes",) not in found


def test_a_limit_of_the_process_needs_a_system_that_measures_it(monkeypatch):
    monkeypatch.setattr(memory_limit.sys, "platform", "darwin")
    memory_limit.check_process_limit(ServerSettings(model_memory="1GiB"))
    with pytest.raises(ServingSettingsError, match="on cpu under darwin; set model_memory"):
        memory_limit.check_process_limit(ServerSettings(memory="1GiB", device="cpu"))
