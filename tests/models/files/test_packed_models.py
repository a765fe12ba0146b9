"""Models whose own weights are packed: loaded, masked, lowered, evicted, restored."""

from pathlib import Path

import pytest
import torch

from rap_env.errors import UnknownNameError, UnsupportedModelError
from rap_env.memory import MemoryModel
from rap_env.models.files.loading import load_llm
from rap_env.models.files.pruned_checkpoint import save_pruned
from rap_env.models.live.elastic import ElasticLLM
from rap_env.paths import cache_dir
from rap_env.plan import Plan
from rap_env.request import Request
from tests.models.states import logits, opened, saved, saved_packed, tensor_bytes, weights_hash
from tests.tiny import DISTINCT_FAMILIES, FAMILIES, LAYERS, each_family

REQUEST = Request(1, 8, 1)


def loaded(tmp_path: Path, name: str, level: str) -> ElasticLLM:
    return load_llm(saved_packed(tmp_path / "model", name, level), device="cpu", dtype="float32")


@each_family("name", DISTINCT_FAMILIES, level=["int8", "int4"], dtype=["float32", "bfloat16"])
def test_packed_weights_equal_the_level_of_a_live_model(tmp_path, name, level, dtype) -> None:
    stored = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    live = opened(saved(tmp_path / "model", name, stored), stored)
    packed = load_llm(
        saved_packed(tmp_path / "packed", name, level, stored), device="cpu", dtype=dtype
    )
    live.apply(Plan.uniform(LAYERS, weights=level, embeddings="int8"))
    assert torch.equal(logits(packed), logits(live))
    assert packed.dtype == live.dtype
    assert packed.facts.weights == "packed"
    assert packed.facts.identity["weights"] == "packed"
    assert tensor_bytes(packed.model) == tensor_bytes(live.model)
    assert tensor_bytes(packed.model) == packed.facts.base_bytes + sum(
        packed.facts.block_param_bytes
    )
    assert packed.fingerprint != live.fingerprint


@pytest.mark.parametrize("name", FAMILIES)
def test_masks_and_levels_of_packed_weights(tmp_path: Path, name: str) -> None:
    llm = loaded(tmp_path, name, "int8")
    memory, before = MemoryModel(llm), weights_hash(llm.model)
    native = logits(llm)
    assert list(llm.facts.weight_levels(0)) == ["native", "int4", "removed"]
    plans = [
        Plan.removing(0, 3),
        Plan.uniform(LAYERS, weights="int4", embeddings="int4"),
        Plan.of({"layer00.attn": "removed", "layer01.attn": "int4"}),
    ]
    for residency in ("resident", "offload", "drop"):
        llm.set_residency(residency)
        for plan in plans:
            llm.apply(plan)
            parts = memory.breakdown(plan, REQUEST)
            assert tensor_bytes(llm.model) == parts.weights + parts.embeddings
            if residency != "resident":
                assert llm.held_bytes.weights == parts.weights + parts.embeddings
            assert not torch.equal(logits(llm), native)
        llm.apply(Plan())
        assert torch.equal(logits(llm), native)
        assert weights_hash(llm.model) == before
    with pytest.raises(UnknownNameError, match="level of weights 'int8'"):
        llm.apply(Plan.uniform(LAYERS, weights="int8"))
    assert torch.equal(logits(llm), native)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gemma3", "gpt2", "opt", "mixtral"])
def test_int4_weights_have_no_level_but_removed(tmp_path: Path, name: str) -> None:
    llm = loaded(tmp_path, name, "int4")
    assert list(llm.facts.weight_levels(0)) == ["native", "removed"]
    assert list(llm.facts.embedding_levels) == ["native", "int4"]
    native, own = logits(llm), llm.held_bytes.weights
    llm.set_residency("drop")  # the packed folder has these bytes
    llm.apply(Plan.of({"layer00.ffn": "removed", "embeddings": "int4"}))
    assert llm.held_bytes.weights < own
    llm.apply(Plan())
    assert torch.equal(logits(llm), native)
    assert not (cache_dir() / "offloaded").exists()


def test_packed_weights_are_rejected_where_unquantised_ones_are_needed(tmp_path: Path) -> None:
    llm = loaded(tmp_path, "llama", "int8")
    with pytest.raises(UnsupportedModelError, match="weights='bf16'"):
        save_pruned(llm, Plan.removing(0), tmp_path / "pruned")
    with pytest.raises(UnsupportedModelError, match="only packed weights"):
        load_llm(tmp_path / "model", device="cpu", weights="bf16")
    with pytest.raises(UnknownNameError, match="format of weights 'int4'"):
        load_llm(tmp_path / "model", device="cpu", weights="int4")
