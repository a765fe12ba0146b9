import json

import pytest

from benchmarks.decide import DecideSettings, main
from experiments.study.experiment_errors import ExperimentError
from rap_env.memory import MemoryModel
from rap_env.models.files.loading import load_llm
from tests.policies import made_ladder
from tests.tiny import tiny_model, tiny_tokenizer


def test_the_decisions_of_a_policy_are_timed(tmp_path):
    folder = tmp_path / "model"
    tiny_model("llama_tied", layers=4).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    model = MemoryModel(load_llm(folder, weights="native").facts)
    made_ladder.policy_file(model, vectors=3).save(tmp_path / "policy.safetensors")
    settings = DecideSettings(
        repeats=2, threads=1, results_dir=str(tmp_path), model=str(folder), weights="native",
        policy=str(tmp_path / "policy.safetensors"), requests=["1x8", "2x16"],
        budgets=[0.9, 0.7], rounds=2,
    )  # fmt: skip
    main(settings)
    record = json.loads((tmp_path / "decide-cpu.json").read_text())
    (decision,) = record["targets"]
    assert decision["what"] == "ms of a decision on 8 blocks, p99 of 4 requests"
    assert decision["at_most"] == 5.0
    measured = record["measured"]
    assert 0 < measured["p50_ms"]["median"] <= measured["any_p99_ms"]["high"]
    with pytest.raises(ExperimentError, match="such as 8x2048; '8' is not"):
        main(DecideSettings(**{**vars(settings), "requests": ["8"]}))
