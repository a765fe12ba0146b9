"""The benchmarks of levels and of resident memory on a tiny model end in a record."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import levels, resident
from rap_env.memory import MemoryModel
from rap_env.models.files.loading import load_llm
from rap_env.plan import CompressionPlan
from rap_env.request import Request
from tests.tiny import tiny_llm, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model("llama_tied", layers=3).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _record(path):
    (file,) = path.glob("*.json")
    return json.loads(file.read_text())


def test_plans_lower_all_blocks_that_have_the_level():
    llm = tiny_llm("llama_tied")
    for level, plan in levels.weight_plans(llm):
        lowered = {index for index, _ in plan.weights}
        assert lowered == {
            i for i in range(llm.num_blocks) if level in llm.facts.weight_levels(i)
        }  # fmt: skip
        assert MemoryModel(llm).check_plan(plan) == plan


def test_the_bytes_of_every_level_are_exact(folder, tmp_path):
    settings = levels.LevelsSettings(
        repeats=1, threads=1, results_dir=str(tmp_path), model=str(folder), context_tokens=40,
        cache_request="2x48", bytes_tokens=60, steps=2, rows=[1, 2],
        caches=["int8", "int4", "int2", "window32"],
    )  # fmt: skip
    levels.main(settings)
    record = _record(tmp_path)
    measured = record["measured"]
    assert {f"cache {name}" for name in settings.caches} <= set(measured["bytes"])
    llm = load_llm(folder, weights="bf16")
    request = Request(2, 60, budget_bytes=2**40)
    held = MemoryModel(llm).breakdown(CompressionPlan.uniform(3, caches="int2"), request)
    found = measured["bytes"]["cache int2"]
    assert found["predicted_bytes"] == held.peak - held.workspace
    assert all(row["difference_bytes"] == 0 for row in measured["bytes"].values())
    assert set(measured["decode"]) == {"1_rows", "2_rows"}
    ratio = measured["prefill"]["ratio"]
    assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
    assert [target["at_most"] for target in record["targets"]] == [
        0.85,
        1.0,
        1.15,
        1.3,
        1.3,
        3.0,
        0,
        5,
    ]


@pytest.mark.slow
def test_resident_memory_is_of_processes_that_load_the_model(folder, tmp_path):
    settings = resident.ResidentSettings(
        repeats=1, threads=1, results_dir=str(tmp_path), model=str(folder), dtype="float32"
    )
    resident.main(settings)
    measured = _record(tmp_path)["measured"]
    for side in ("rap_env", "transformers"):
        both = measured[side]
        assert 0 < both["model_bytes"]["median"] < both["all_bytes"]["median"]
