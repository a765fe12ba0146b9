"""The benchmarks of a live model on a tiny one: what they count, and that they end in a record."""

import json

import pytest
import torch

from benchmarks import levels, memory, scoring
from benchmarks.engine_steps import targets_of
from rap_env.memory import MemoryModel
from rap_env.models.files.pruned_checkpoint import load_pruned, save_pruned
from rap_env.plan import Plan
from rap_env.request import Request
from tests.tiny import tiny_llm, tiny_model, tiny_tokenizer

LAYERS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model("llama_tied", layers=LAYERS).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def measured(folder, tmp_path):
    """Runs a benchmark on the tiny model; its records by name."""

    def run(module, schema, **settings):
        common = {"repeats": 1, "threads": 1, "results_dir": str(tmp_path), "model": str(folder)}
        module.main(schema(**common, **settings))
        return {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}

    return run


class TestMemory:
    @pytest.mark.parametrize("removed", [(), ("layer00.attn", "layer02.ffn")])
    def test_weights_and_cache_of_a_pruned_model_are_as_predicted(self, removed, tmp_path):
        llm, mask = tiny_llm("llama_tied", layers=LAYERS), Plan.removing(*removed)
        request = Request(2, 12, budget_bytes=2**62)
        predicted = MemoryModel(llm).breakdown(mask, request)
        pruned = load_pruned(save_pruned(llm, mask, tmp_path / "pruned"))
        measured = memory.measure(pruned, request, steps=2)
        assert measured["weights_bytes"] == predicted.weights + predicted.embeddings
        assert measured["kv_cache_bytes"] == predicted.kv_cache
        tensors = measured["weights_bytes"] + measured["kv_cache_bytes"]
        logits = 2 * llm.facts.vocab_size * 4
        assert tensors + logits <= measured["peak_bytes"] < 2 * tensors

    def test_the_benchmark_writes_a_record(self, measured):
        requests = ["1x8", "2x12"]
        records = measured(
            memory, memory.MemorySettings, dtype="float32", requests=requests, steps=2
        )
        weights, cache, peak = records["memory-cpu"]["targets"]
        assert (weights["reached"], cache["reached"]) == (0, 0)
        cells = records["memory-cpu"]["measured"]["cells"].values()
        assert peak["reached"] == max(abs(cell["peak_off_%"]) for cell in cells)
        assert len(cells) == 8


def test_levels_are_compared_and_changed(measured):
    records = measured(
        levels, levels.LevelsSettings, context_tokens=40, cache_request="2x48", steps=2,
        rows=[1, 2], blocks=3,
    )  # fmt: skip
    record = records["levels-cpu"]
    assert set(record["measured"]["decode"]) == {"1_rows", "2_rows"}
    ratio = record["measured"]["prefill"]["ratio"]
    assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
    bounds = [target["at_most"] for target in record["targets"]]
    assert bounds == [0.85, 1.0, 1.15, 1.3, 1.3, 3.0]
    masks = records["live-cpu"]["measured"]
    assert 0 < masks["switch"]["change_s"]["low"] <= masks["switch"]["change_s"]["high"]
    assert len(records["live-cpu"]["targets"]) == 1


@pytest.mark.slow
def test_scoring_checks_scores_and_orders_against_a_plain_model(measured):
    records = measured(
        scoring, scoring.ScoringSettings, windows=2, window_tokens=24, masks=12, train_steps=40,
        removals=3, dtype="float32",
    )  # fmt: skip
    masks, gsi = records["nll_many-cpu"]["measured"], records["gsi-cpu"]["measured"]
    assert masks["dense"]["masks"] == 12
    assert masks["dense"]["largest_nll_difference_to_naive"] < 1e-4
    assert len(gsi["order"]) == 3
    assert gsi["lazy"]["candidates"] <= gsi["exact"]["candidates"] == 8 + 7 + 6
    assert [target["at_least"] for target in records["gsi-cpu"]["targets"]] == [2.2, 9.0, None]


@pytest.mark.parametrize(
    ("rows", "tokens", "met"),
    [(1, 128, [True]), (8, 128, [False]), (3, 128, []), (1, 512, [True, False])],
)
def test_targets_beside_llama_cpp_follow_rows_and_tokens(rows, tokens, met):
    seconds = {
        "own decode_s": [1.2, 1.0], "own prefill_s": [0.4, 0.4],
        "llama.cpp decode_s": [1.0, 1.0], "llama.cpp prefill_s": [1.0, 1.0],
    }  # fmt: skip
    targets = list(targets_of(seconds, rows, tokens))
    assert [target.met for target in targets] == met
    if targets:
        assert (targets[0].reached, targets[0].high) == (pytest.approx(1.1), 1.2)
