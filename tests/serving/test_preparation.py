"""A server prepares the model that it serves: before it starts, or while it serves."""

import sys

import pytest
import torch

from rap_env.errors import ServingSettingsError
from rap_env.importance import preparation
from rap_env.importance.level_costs import prepared_costs
from rap_env.memory import MemoryModel
from rap_env.models.device import resident_bytes
from rap_env.models.files.loading import load_llm
from rap_env.models.live import calibration_text
from rap_env.plan import Plan
from rap_env.policies.loading import load_policy
from rap_env.runtime.controller import RuntimeController
from rap_env.runtime.memory_limit import LiveLimit
from rap_env.runtime.memory_monitor import TensorMeter
from rap_env.serving.background_preparation import BackgroundPreparation, start_preparation
from rap_env.serving.served_model import load_served_model
from rap_env.serving.settings import ServerSettings
from rap_env.serving.startup import prepare_before
from tests.models.states import saved

workers = preparation._workers


@pytest.fixture(autouse=True)
def little_text(monkeypatch):
    monkeypatch.setattr(preparation, "QUICK_COST_TOKENS", 32)
    monkeypatch.setattr(preparation, "QUICK_LEVEL_WINDOWS", 2)
    monkeypatch.setattr(preparation, "_workers", lambda llm, memory_bytes, thorough: 1)
    monkeypatch.setattr(calibration_text, "_LEVEL_TOKENS", 32)
    monkeypatch.setattr(calibration_text, "SOURCE_FILES", ("queue.py",))


@pytest.fixture
def folder(tmp_path):
    return saved(tmp_path / "own-model", "llama_wide", torch.float32)


@pytest.fixture
def served(folder):
    """The settings of a server of a model that was never prepared, and its controller."""
    settings = ServerSettings(model=str(folder), dtype="float32")
    llm = load_llm(folder, dtype="float32", lean=True, quick_levels=True)
    policy = load_policy("knapsack", llm)
    return settings, RuntimeController(llm, policy, 2**30, meter=TensorMeter(llm))


@pytest.mark.parametrize("apart", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_model_that_fits_is_prepared_while_it_serves(served, apart, monkeypatch):
    settings, controller = served
    if not apart:  # with little text, in this process

        def run(_preparation):
            preparation.prepare(settings.model, dtype="float32", progress=False)
            return ""

        monkeypatch.setattr(BackgroundPreparation, "_prepare", run)
    assert controller.chooser.policy.name == "uniform"
    assert controller.chooser.max_delta_nll is None
    started = start_preparation(settings, controller, None)
    started.join(timeout=300)
    chooser = controller.chooser
    assert chooser.policy.name == "knapsack"
    assert (chooser.max_delta_nll, chooser.most_delta_nll) == (0.1, 0.3)
    assert not controller.llm.absent_levels(("int3", "int2"))
    assert start_preparation(settings, controller, None) is None, "it is prepared"


def test_without_room_the_preparation_waits_and_says_so_once(served, caplog):
    settings, controller = served
    limit = LiveLimit("memory", 2**20)
    waiting = BackgroundPreparation(settings, controller, limit)
    with caplog.at_level("INFO"):
        waiting.start()
        waiting.join(timeout=2.5)
        assert waiting.is_alive()
        waiting.close()
    waits = [m for m in caplog.messages if "waits until" in m]
    assert len(waits) == 1
    assert f"`rap prepare {settings.model}` prepares it beforehand" in waits[0]
    assert controller.chooser.policy.name == "uniform"


@pytest.mark.parametrize("changed", [{"prepare": "off"}, {"weights": "bf16"}, {"policy": "dense"}])
def test_it_is_not_prepared_where_that_is_off_or_gains_nothing(served, changed):
    settings, controller = served
    other = ServerSettings(model=settings.model, dtype="float32", **changed)
    assert start_preparation(other, controller, None) is None


def test_a_model_that_does_not_fit_is_prepared_before_it_serves(folder):
    native = MemoryModel(load_llm(folder, dtype="float32")).native_peak_bytes(1, 32)
    fits = ServerSettings(model=str(folder), dtype="float32", model_memory=2 * native)
    prepare_before(fits)
    assert prepared_costs(load_llm(folder, dtype="float32", quick_levels=True)) is None
    low = ServerSettings(model=str(folder), dtype="float32", model_memory=native // 2)
    prepare_before(low)
    assert prepared_costs(load_llm(folder, dtype="float32", quick_levels=True)) is not None


def test_a_limit_in_which_a_model_cannot_be_prepared(folder, monkeypatch):
    monkeypatch.setattr(preparation, "_workers", workers)
    settings = ServerSettings(model=str(folder), dtype="float32", memory="1MiB")
    with pytest.raises(ServingSettingsError, match="run `rap prepare .*own-model"):
        prepare_before(settings)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_only_a_prepared_model_starts_where_it_does_not_fit_as_it_is(folder):
    settings = ServerSettings(model=str(folder), dtype="float32")
    limit = LiveLimit("memory", resident_bytes()[1] // 2)  # no room for its weights
    with pytest.raises(ServingSettingsError, match="needs"):
        load_served_model(settings, limit)
    preparation.prepare(str(folder), dtype="float32", progress=False)
    served = load_served_model(settings, limit)
    assert served.on_demand
    assert len(served.plan.removed) == served.num_blocks
    whole = load_served_model(settings)
    assert not whole.on_demand
    ids = torch.arange(4, 14)[None]
    for plan in (Plan.of({"layer00.ffn": "int3", "layer01.attn": "int4-compact"}), Plan()):
        states = []
        for llm in (served, whole):
            with llm.applied(plan):
                states.append(llm.hidden(ids))
        assert torch.equal(*states)
