from __future__ import annotations

import json

import pytest

from agents.trained_policy import TrainedPolicy
from benchmarks.decide import DecideSettings, Side, main, torch_policy
from rap_env.blocks import BlockMask
from rap_env.errors import InvalidRequestError
from rap_env.memory import MemoryModel
from rap_env.models.files.loading import load_llm
from rap_env.observation import ObservationBuilder
from rap_env.request import Request
from rap_env.runtime.policies import NetworkPolicy
from rap_env.runtime.policy_file import PolicyFile, PolicyModel, order_of
from tests.runtime import made_ladder
from tests.runtime.made_policies import features, memory, policy_file, weights
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.mark.parametrize("settings", [{}, {"block_vectors": 3}, {"without": ("gsi", "request")}])
def test_the_network_in_torch_is_the_same_policy(settings):
    file, model = policy_file(**settings), memory()
    builder = ObservationBuilder(model, file.features)
    trained = TrainedPolicy(torch_policy(file.weights, builder), builder)
    exported = NetworkPolicy(model, file)
    for fraction in (0.9, 0.7, 0.5):
        request = Request.at_fraction(model, 4, 500, fraction)
        assert trained.choose(request) == exported.choose(request)


def test_every_decision_is_timed():
    asked = [Request(1, length, 10**9) for length in (5, 6, 7)]
    side = Side(lambda request: BlockMask.of(request.seq_len_tokens), asked, rounds=2)
    side()
    side()
    assert [len(call) for call in side.milliseconds] == [6, 6]
    assert side.plans == [BlockMask.of(n) for n in (5, 6, 7)] * 2
    side.milliseconds = [[9.0, 9.0, 9.0] * 3, [1.0, 2.0, 3.0] * 2 + [1.0, 50.0, 3.0]]
    side.cpu_milliseconds, side.rounds = side.milliseconds, 3
    found = side.quantiles(repeats=1)
    assert found["p50_ms"]["median"] == 2.0
    assert found["p99_ms"]["median"] == pytest.approx(2.98), "a request at the median of its rounds"
    assert found["any_p99_ms"]["median"] > 40
    assert found["cpu_p50_ms"]["repeats"] == 1


def test_the_benchmark_writes_a_record_of_both_sides(tmp_path):
    folder = tmp_path / "model"
    tiny_model("llama_tied", layers=4).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    facts, seen = load_llm(folder).facts, features(4)
    made = PolicyFile(weights(4, block_vectors=3), seen, order_of(seen), PolicyModel.of(facts))
    made.save(tmp_path / "policy.safetensors")
    results = tmp_path / "results"
    settings = DecideSettings(
        repeats=2, threads=1, results_dir=str(results), model=str(folder),
        policy=str(tmp_path / "policy.safetensors"), requests=["1x8", "2x16"],
        budgets=[0.9, 0.7], rounds=2,
    )  # fmt: skip
    main(settings)
    record = json.loads((results / "decide-cpu.json").read_text())
    assert record["measured"]["same_masks_share"] == 1.0
    assert 0 < record["measured"]["blocks_removed_mean"] <= 8
    decision, ratio = record["targets"]
    assert decision["what"] == "ms of a decision on 8 blocks, p99 of 4 requests"
    assert (decision["at_most"], ratio["at_least"]) == (5.0, 1.0)
    for side in ("exported", "torch"):
        found = record["measured"][side]
        assert 0 < found["p50_ms"]["median"] <= found["any_p99_ms"]["high"]
    with pytest.raises(InvalidRequestError, match=r"written like 4x1024 .*, not '8'"):
        main(DecideSettings(**{**vars(settings), "requests": ["8"]}))
    with pytest.raises(InvalidRequestError, match="policy=dense is no network"):
        main(DecideSettings(**{**vars(settings), "policy": "dense"}))


def test_decisions_of_a_policy_over_items_are_timed(tmp_path):
    folder = tmp_path / "model"
    tiny_model("llama_tied", layers=4).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    model = MemoryModel(load_llm(folder, weights="native").facts)
    made_ladder.policy_file(model, item_vectors=3).save(tmp_path / "policy.safetensors")
    settings = DecideSettings(
        repeats=2, threads=1, results_dir=str(tmp_path), model=str(folder), weights="native",
        policy=str(tmp_path / "policy.safetensors"), requests=["1x8", "2x16"],
        budgets=[0.9, 0.7], rounds=2,
    )  # fmt: skip
    main(settings)
    record = json.loads((tmp_path / "decide_items-cpu.json").read_text())
    assert record["measured"]["same_plans_share"] == 1.0
    assert record["measured"]["items_lowered_mean"] > 0
    assert "ms of a decision on" in record["targets"][0]["what"]
