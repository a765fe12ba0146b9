"""The memory limit: checked early, reported, and changed by a file."""

import logging
import subprocess
import sys
import time

import httpx
import pytest
import torch
import transformers
from prometheus_client.parser import text_string_to_metric_families

from rap_env.errors import ServingSettingsError
from rap_env.memory import MemoryModel
from rap_env.models.device import drop_unused_pages, resident_bytes
from rap_env.models.files import loading
from rap_env.runtime.memory_limit import GivenMemory, LiveLimit
from rap_env.runtime.memory_monitor import TensorMeter
from rap_env.serving import stack
from rap_env.serving.served_model import check_started
from rap_env.serving.settings import ServerSettings
from rap_env.serving.stack import build_stack, greeting, open_limit
from tests.serving.background import BackgroundServer
from tests.serving.test_app import PLAIN, error_of, post
from tests.serving.test_policies import knapsack_of
from tests.tiny import tiny_config, tiny_llm, tiny_model

MIB = 2**20
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


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
    drop_unused_pages()  # as the start does
    need = resident_bytes()[1]
    with pytest.raises(
        ServingSettingsError, match=r"memory is 1MiB, .* needs (\d+)MiB to"
    ) as found:
        build_stack(ServerSettings(model=folder, memory="1MiB", policy="dense"))
    stated = int(str(found.value).partition("needs ")[2].partition("MiB")[0])
    assert stated * MIB > need


START = """
import re, sys
from rap_env.errors import ServingSettingsError
from rap_env.models.device import resident_bytes
from rap_env.serving.settings import ServerSettings
from rap_env.serving.stack import build_stack

def start(memory):
    return build_stack(
        ServerSettings(model=sys.argv[1], memory=memory, policy="dense", dtype="float32")
    )

try:
    start("1MiB")
except ServingSettingsError as error:
    print(re.search(r"needs (\\d+)MiB", str(error))[1])
started = start("8GiB")
print(resident_bytes()[0] / 2**20)
"""


@linux
def test_a_process_asks_for_about_the_memory_that_it_takes(tmp_path, tokenizer):
    """Of a model that is loaded tensor by tensor.

    Where the system's page cache has libraries in large pieces, as after an installation, more
    of their pages count as memory of the process than are used: 12 % more than was asked for.
    """
    config = tiny_config("llama", layers=12)
    config.update({"hidden_size": 512, "head_dim": 128, "intermediate_size": 2048})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    command = [sys.executable, "-c", START, str(tmp_path)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    stated_mib, taken_mib = map(float, output.split())
    assert 0.85 * taken_mib < stated_mib < 1.1 * taken_mib


@linux
def test_the_server_starts_within_a_limit_that_is_large_enough_and_reports_it(folder):
    limit = resident_bytes()[0] + 2**30  # other tests have raised the mark
    settings = ServerSettings(model=folder, memory=limit, policy="dense", dtype="float32")
    stack = build_stack(settings)
    monitor = stack.engine.controller.monitor
    source = monitor.source
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
        check_started("tiny", open_limit(settings))
    llm = tiny_llm(tokenizer=tokenizer)
    settings = ServerSettings(memory=resident_bytes()[1] // 2, policy="dense")
    with pytest.raises(ServingSettingsError, match=r"memory must be at least .*MiB.* not"):
        build_stack(settings, llm=llm)


def test_a_limit_of_the_process_needs_a_system_that_measures_it(monkeypatch):
    monkeypatch.setattr(stack.sys, "platform", "darwin")
    open_limit(ServerSettings(model_memory="1GiB"))
    with pytest.raises(ServingSettingsError, match="on cpu under darwin; set model_memory"):
        open_limit(ServerSettings(memory="1GiB", device="cpu"))


def settled(limit):
    """The limit once a change of its file has been noticed and has lasted."""
    limit()
    time.sleep(0.06)
    return limit()


def test_the_limit_follows_its_file_however_it_is_written(tmp_path):
    path = tmp_path / "limit"
    limit = LiveLimit("memory", 500 * MIB, str(path))
    assert limit() == 500 * MIB
    path.write_text("400MiB\n")
    assert settled(limit) == 400 * MIB
    (tmp_path / "new").write_text("450 MiB")
    (tmp_path / "new").replace(path)
    assert settled(limit) == 450 * MIB
    path.unlink()
    assert settled(limit) == 450 * MIB
    for part in ("3", "30", "300", "300M", "300MiB"):  # it is being written
        path.write_text(part)
        assert limit() == 450 * MIB
    assert settled(limit) == 300 * MIB
    assert LiveLimit("memory", 500 * MIB, str(path))() == 300 * MIB
    path.write_text("400MiB")
    time.sleep(0.06)
    assert limit() == 400 * MIB  # one look is enough some time after the change


@pytest.mark.parametrize("text", [None, "", "300Mi", "\u00e9", "9" * 100, "10"])
def test_a_wrong_file_keeps_the_last_value_with_one_warning(tmp_path, caplog, text):
    path = tmp_path / "limit"
    path.write_text("200")
    limit = LiveLimit("memory", 500, str(path))
    limit.attach("tiny", 100, GivenMemory(limit))
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    for _ in range(5):
        assert settled(limit) == 200
    (warning,) = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert "memory stays at 1MiB" in warning.getMessage()
    path.write_text("300")
    assert settled(limit) == 300


def test_a_file_that_is_wrong_at_the_start_is_an_error(tmp_path):
    (tmp_path / "limit").write_text("lots")
    settings = ServerSettings(model_memory="1GiB", memory_file=str(tmp_path / "limit"))
    with pytest.raises(ServingSettingsError, match="memory_file .*limit must be a number of bytes"):
        build_stack(settings, llm=tiny_llm())
    with pytest.raises(ServingSettingsError, match="memory_file needs memory or model_memory"):
        ServerSettings(memory_file="limit")


def test_the_model_follows_the_file(tokenizer, tmp_path):
    llm = tiny_llm(tokenizer=tokenizer)
    path = tmp_path / "limit"
    settings = ServerSettings(model_memory="1GiB", memory_file=str(path), policy="dense")
    stack = build_stack(settings, llm=llm, meter=TensorMeter(llm))
    assert "Memory: at most 1024MiB for the model now" in greeting(stack, "http://here")
    reported = gauges(stack)
    assert reported["rap_memory_limit_bytes", "model"] == 2**30
    assert ("rap_memory_other_bytes",) not in reported
    monitor = stack.engine.controller.monitor
    assert monitor.budget_bytes == 2**30
    path.write_text("1MiB")
    assert settled(stack.limit) == MIB
    monitor.poll()
    assert monitor.budget_bytes == MIB
    path.write_text("1KiB")  # not even one token fits
    assert settled(stack.limit) == MIB


def test_a_limit_in_which_nothing_fits_refuses_at_once_and_says_why(tokenizer):
    llm = tiny_llm(layers=3, tokenizer=tokenizer)
    policy = knapsack_of(MemoryModel(llm))
    settings = ServerSettings(model_name="tiny", model_memory="1GiB", max_delta_nll=0.0)
    stack = build_stack(settings, llm=llm, policy=policy, meter=TensorMeter(llm))
    little = MemoryModel(llm).native_peak_bytes(1, 1) // 2
    with BackgroundServer(stack.app) as server:
        stack.limit.set(little)
        reason = httpx.get(f"{server.url}/readyz").json()["reason"]
        assert "raise model_memory (or memory), or max_delta_nll" in reason
        error = error_of(post(server, PLAIN, "completions"), 503)
        assert (error["code"], error["message"]) == ("insufficient_memory", reason)
        stack.limit.set(2**30)
        assert post(server, PLAIN, "completions").status_code == 200
