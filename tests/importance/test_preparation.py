"""Preparing a model: the same costs however the work is shared or interrupted."""

import shutil
from statistics import fmean

import gymnasium
import pytest

from rap_env.artifacts import save_artifact
from rap_env.errors import (
    ArtifactError,
    CorpusError,
    InvalidRequestError,
    ModelNotAvailableError,
)
from rap_env.importance import gradient_costs, preparation
from rap_env.importance.gradient_costs import (
    fitted_costs,
    plan_nlls,
    window_costs,
)
from rap_env.importance.level_costs import prepared_costs
from rap_env.importance.preparation import prepare
from rap_env.memory import MemoryModel
from rap_env.models.files.loading import load_llm
from rap_env.models.files.prepared_files import write_prepared
from rap_env.models.live import calibration, calibration_text
from rap_env.models.live.calibration_text import COST_KINDS, mixed_windows
from rap_env.models.live.partial_forward import PartialForward
from rap_env.models.progress import progress_bar
from rap_env.models.shared_tasks import FORMAT, KIND, Tasks
from rap_env.paths import cache_dir, prepared_dir
from rap_env.plan import Plan
from rap_env.policies.loading import load_policy
from rap_env.request import Request
from rap_env.scoring.corpus import Corpus
from tests.tiny import tiny_model, tiny_tokenizer

workers = preparation._workers


@pytest.fixture(scope="module", autouse=True)
def little_text():
    """Models are prepared with little text, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "COST_WINDOWS", 2)
        patch.setattr(preparation, "COST_TOKENS", 32)
        patch.setattr(preparation, "QUICK_COST_TOKENS", 32)
        patch.setattr(preparation, "QUICK_COST_WINDOWS", 2)
        patch.setattr(preparation, "_workers", lambda llm, memory_bytes, thorough: 1)
        patch.setattr(calibration_text, "SOURCE_FILES", ("queue.py",))
        yield


@pytest.fixture
def folder(tmp_path):
    """A model with levels of few bits."""
    folder = tmp_path / "own-model-1.5b"
    tiny_model("llama_wide", layers=2).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def prepared(folder, *, thorough=True, **options):
    return prepare(folder, dtype="float32", progress=False, thorough=thorough, **options)


@pytest.fixture(scope="module")
def finished(little_text, tmp_path_factory):
    """The cache after the model was prepared, and its costs."""
    base = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAP_CACHE_DIR", str(base / "cache"))
        tiny_model("llama_wide", layers=2).save_pretrained(base / "model")
        tiny_tokenizer().save_pretrained(base / "model")
        costs, _ = prepared(base / "model")
    return base / "cache", costs


@pytest.fixture
def ready(finished, folder):
    """The model, its costs and their file, where it has been prepared."""
    cache, costs = finished
    shutil.copytree(cache, cache_dir())
    return folder, costs, prepared_dir(costs.provenance["fingerprint"]) / "costs.json"


def test_costs_are_those_of_the_model_in_memory_with_the_levels_that_were_made(ready):
    folder, costs, path = ready
    llm = load_llm(folder, dtype="float32")
    assert not llm.absent_levels(("int4-compact", "int3", "int2"))
    windows = mixed_windows(llm, 2, 32, COST_KINDS)
    forward = PartialForward(llm, widen=True, gradients=True)
    parts = [window_costs(forward, window[None], costs.costs) for window in windows]

    def measure(plans):
        return [plan_nlls(forward, windows, plan) for plan in plans]

    text = Corpus.of_tokens(windows)
    expected = fitted_costs(llm.facts, parts, costs.costs, text, measure, COST_KINDS[:2], 4)
    assert Plan.of(llm.facts.blocks_at("int4-compact")).to_json() in costs.joint
    assert set(costs.costs["layer00.ffn"]) == {"int8", "int4-compact", "int3", "int2", "removed"}
    for item, levels in costs.costs.items():
        for level, cost in levels.items():
            assert cost == pytest.approx(expected.costs[item][level], rel=1e-3, abs=1e-7)
    assert costs.native_nll == pytest.approx(expected.native_nll, rel=1e-5)
    assert not list(path.parent.glob("*.part")), "the files of the run are removed"


def test_quick_levels_are_served_until_thorough_ones_replace_them(folder):
    quick, path = prepared(folder, thorough=False)
    assert set(quick.costs["layer00.ffn"]) == {"int8", "int4-compact", "int3", "int2"}
    served = load_llm(folder, dtype="float32", quick_levels=True)
    assert prepared_costs(served) == quick
    assert not served.absent_levels(("int3",))
    studied = load_llm(folder, dtype="float32")
    assert prepared_costs(studied) is None
    assert studied.absent_levels(("int3",)), "a study makes its levels by GPTQ"
    assert studied.facts.calibration != served.facts.calibration
    thorough, _ = prepared(folder)
    for quick_levels in (True, False):
        llm = load_llm(folder, dtype="float32", quick_levels=quick_levels)
        assert prepared_costs(llm) == thorough
    assert prepared(folder, thorough=False) == (thorough, path), "quick ones replace no others"


def test_quick_costs_of_windows_of_caches_are_measured_on_chats(folder, monkeypatch):
    monkeypatch.setattr(preparation, "QUICK_COST_TOKENS", 256)
    tiny_model("llama_wide", layers=2, positions=256).save_pretrained(folder)
    costs, _ = prepared(folder, thorough=False)
    llm = load_llm(folder, dtype="float32", quick_levels=True)
    forward = PartialForward(llm, widen=True)
    chats = mixed_windows(llm, 2, 256, ["chat"])
    joint = map(Plan.from_json, costs.joint)
    windows = [plan for plan in joint if any(level.window_tokens for _, level in plan.caches)]
    assert len(windows) == 1
    native, short = (fmean(plan_nlls(forward, chats, plan)) for plan in (Plan(), *windows))
    assert costs.joint[windows[0].to_json()] == pytest.approx(short - native, abs=1e-5)
    assert native != pytest.approx(short, abs=1e-4)


def test_the_knapsack_uses_the_costs_from_then_on(ready):
    folder, costs, _ = ready
    llm = load_llm(folder, dtype="float32")
    policy = load_policy("knapsack", llm)
    memory = MemoryModel(llm)
    request = Request(1, 32, int(0.5 * memory.native_peak_bytes(1, 32)))
    plan = policy.choose(request)
    assert memory.peak_bytes(plan, request) <= request.budget_bytes
    assert policy.delta_nll(plan) == pytest.approx(costs.delta_nll(plan))


@pytest.mark.parametrize(("levels", "covered"), [("all", True), ("four-bits", False)])
def test_an_environment_has_these_costs_if_they_cover_its_ladder(
    ready, levels, covered, monkeypatch
):
    folder, costs, _ = ready
    computed, compute = [], gradient_costs.gradient_costs

    def noted(*args, **options):
        computed.append(compute(*args, **options))
        return computed[-1]

    monkeypatch.setattr(gradient_costs, "gradient_costs", noted)
    env = gymnasium.make(
        "RAPLadder-v0", model=str(folder), dtype="float32", levels=levels, store=None,
        workload={"name": "grid", "batch_sizes": [1], "seq_lens_tokens": [32]},
        calibration={"source": "self", "windows": 1, "window_tokens": 32},
    ).unwrapped  # fmt: skip
    observed = env.context.level_costs(env.ladder)
    assert observed == (costs if covered else computed[0])
    assert len(computed) == (not covered)
    assert observed.provenance["text"]["source"] == ("mixture" if covered else "self")
    assert ("int4" in observed.costs["layer00.ffn"]) == (not covered)


def test_a_run_that_was_ended_goes_on_where_it_was(folder, finished, monkeypatch):
    done, whole = [], calibration._run_natively

    def ends_in_the_second_layer(llm, forward, step, states):
        done.append(step)
        if len(done) == 3:
            raise KeyboardInterrupt
        return whole(llm, forward, step, states)

    monkeypatch.setattr(calibration, "_run_natively", ends_in_the_second_layer)
    with pytest.raises(KeyboardInterrupt):
        prepared(folder)
    assert prepared_costs(load_llm(folder, dtype="float32")) is None
    costs, path = prepared(folder)
    assert done[0] not in done[3:], "the first layer is not made again"
    assert costs.costs == finished[1].costs
    assert path == prepared_dir(costs.provenance["fingerprint"]) / "costs.json"


def test_a_prepared_model_is_not_prepared_again(ready, monkeypatch):
    folder, costs, path = ready
    monkeypatch.setattr(preparation, "_work", lambda *args: pytest.fail("it ran again"))
    assert prepared(folder) == (costs, path)


def test_a_process_that_waited_for_another_does_not_prepare_again(ready, monkeypatch):
    (folder, costs, path), opened = ready, []

    def before_the_other_ended(*args, **options):
        hidden = path.parent.rename(path.parent.with_name("hidden"))
        opened.append(load_llm(*args, **options))
        hidden.rename(path.parent)
        return opened[-1]

    monkeypatch.setattr(preparation, "load_llm", before_the_other_ended)
    monkeypatch.setattr(preparation, "_work", lambda *args: pytest.fail("it ran again"))
    assert prepared(folder) == (costs, path)


@pytest.mark.parametrize("cores", [1, 2])
def test_a_limit_of_memory_that_is_too_low(folder, monkeypatch, cores):
    monkeypatch.setattr(preparation, "_workers", workers)
    monkeypatch.setattr(preparation.os, "cpu_count", lambda: cores)
    llm = load_llm(folder, dtype="float32")
    need = preparation.resident_bytes()[1] + preparation.process_bytes(llm, thorough=True)
    with pytest.raises(InvalidRequestError, match="preparing own-model-1.5b takes about"):
        prepared(folder, memory_bytes=need // 4)
    assert workers(llm, None, True) == workers(llm, 3 * need, True) == cores
    assert workers(llm, need + need // 2, True) == 1


@pytest.mark.slow
def test_two_processes_give_the_same(folder, finished, monkeypatch):
    monkeypatch.setattr(preparation, "_workers", lambda llm, memory_bytes, thorough: 2)
    shared, _ = prepared(folder)
    assert shared.costs == finished[1].costs


def test_four_bits_need_no_levels_that_a_text_makes(folder, caplog):
    with caplog.at_level("INFO"):
        costs, _ = prepared(folder, bits=4)
    assert sum("Loading" in message for message in caplog.messages) == 1
    assert set(costs.costs["layer00.ffn"]) == {"int8", "int4", "removed"}
    assert not list(cache_dir().glob("calibrated/*/*"))


def test_a_short_text_is_enough_for_costs_alone(folder, tmp_path):
    text = tmp_path / "own.txt"
    text.write_text("the model of memory and the rest of it " * 12)
    costs, _ = prepared(folder, bits=4, text=text)
    assert costs.provenance["text"]["source"] == str(text)
    with pytest.raises(CorpusError, match=r"but 1,008 are needed \(16 windows of 63\)"):
        prepared(folder, bits=3, text=text)
    text.write_text("the")
    with pytest.raises(CorpusError, match=r"are needed \(1 windows of 32\)"):
        prepared(folder, bits=4, text=text)


def test_the_time_left_does_not_count_what_an_earlier_run_did(tmp_path, monkeypatch):
    bars = []

    def shown(*args, **options):
        bars.append(progress_bar(*args, **options))
        return bars[0]

    monkeypatch.setattr(preparation, "progress_bar", shown)
    for number in range(3):
        save_artifact(tmp_path / f"levels-{number:03d}.json", KIND, FORMAT, {})
    with preparation._progress(True, bits=2) as note:
        Tasks(tmp_path, lambda: None, note).run("levels", 4, lambda number: {})
        state = bars[0].format_dict
    assert (state["initial"], state["n"]) == (38, 50)
    assert state["rate"] is None, "tqdm takes the mean rate since the start, without these 38"


def test_the_file_of_a_prepared_model_is_found_beside_it(ready):
    folder, costs, path = ready
    write_prepared(path, folder.with_name("own-model-1.5b.rap"))
    made = sorted(file.name for file in cache_dir().glob("calibrated/*/*"))
    shutil.rmtree(cache_dir())
    llm = load_llm(folder, dtype="float32")
    assert path.is_file()
    assert prepared_costs(llm) == costs
    assert sorted(file.name for file in cache_dir().glob("calibrated/*/*")) == made
    assert not llm.absent_levels(("int3",))


@pytest.mark.parametrize("other_machine", [False, True])
def test_a_later_preparation_counts_and_not_the_file_beside_the_model(ready, other_machine):
    folder, _, path = ready
    write_prepared(path, folder.with_name("own-model-1.5b.rap"))
    if other_machine:
        shutil.rmtree(cache_dir())
    later, _ = prepared(folder, bits=4)
    assert "int4" in later.costs["layer00.ffn"]
    assert prepared_costs(load_llm(folder, dtype="float32")) == later
    shutil.rmtree(path.parent)
    again = prepared_costs(load_llm(folder, dtype="float32"))
    assert "int3" in again.costs["layer00.ffn"], "without its folder the file is copied again"


def test_the_file_of_another_model_is_not_used(ready, tmp_path, caplog):
    _, costs, path = ready
    tiny_model("llama_wide", layers=1).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    write_prepared(path, tmp_path / "other.rap")
    shutil.rmtree(cache_dir())
    assert prepared_costs(load_llm(tmp_path / "other", dtype="float32")) is None
    assert not (cache_dir() / "prepared").exists()
    (warning,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    model = costs.provenance["model"]
    assert f"other.rap is not used, because it was prepared from {model} with other" in warning


def test_a_damaged_file_of_a_prepared_model(folder):
    beside = folder.with_name("own-model-1.5b.rap")
    beside.write_bytes(b"PK no archive")
    with pytest.raises(ArtifactError, match="is damaged or no file of a prepared model"):
        load_llm(folder)
    assert not (cache_dir() / "prepared").exists()


def test_what_cannot_be_prepared(folder):
    with pytest.raises(InvalidRequestError, match="bits must be 2, 3 or 4, not 5"):
        prepared(folder, bits=5)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["the", "and", "of", "to"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelNotAvailableError, match="token id 64, but .* ids below 64"):
        prepared(folder)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelNotAvailableError, match="tokenizer"):
        prepared(folder)
