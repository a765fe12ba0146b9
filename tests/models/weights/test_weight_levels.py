"""Weights at other levels: packed modules in their places, exact bytes, exact restoration."""

from pathlib import Path

import pytest
import torch

from rap_env.errors import UnknownNameError
from rap_env.memory import MemoryModel
from rap_env.models.weights.packed_modules import PackedModule
from rap_env.plan import Plan
from rap_env.request import Request
from tests.models.states import apply_to, logits, tensor_bytes, weights_hash
from tests.tiny import FAMILIES, LAYERS, each_family, tiny_llm, tiny_model

EVERY_FAMILY = pytest.mark.parametrize("name", FAMILIES)
REQUEST = Request(1, 8, 1)
MIXED = Plan.of(
    {"layer00.attn": "int8", "layer00.ffn": "int4", "layer01.ffn": "removed", "embeddings": "int8"}
)


def uniform(level: str, embeddings: str = "native") -> Plan:
    return Plan.uniform(LAYERS, weights=level, embeddings=embeddings)


@each_family("name", dtype=[torch.float32, torch.bfloat16])
def test_predicted_bytes_are_those_of_the_tensors(name: str, dtype: torch.dtype) -> None:
    llm = tiny_llm(name, dtype=dtype)
    memory, before = MemoryModel(llm), tensor_bytes(llm.model)
    plans = [
        Plan(),
        *(uniform(level) for level in ("int8", "int4")),
        *(Plan(embeddings=level) for level in llm.facts.embedding_levels),
        uniform("int4", "int8"),
        MIXED,
    ]
    seen = []
    for plan in plans:
        llm.apply(plan)
        parts = memory.breakdown(plan, REQUEST)
        assert tensor_bytes(llm.model) == parts.weights + parts.embeddings, str(plan)
        seen.append(tensor_bytes(llm.model))
    assert before == seen[0] > seen[1] > seen[2]
    assert len(set(seen)) == len(seen) - 1  # native embeddings are the empty plan


@pytest.mark.engine_feature("here", "Levels of weights", "int8, int4, int3, int2")
@each_family("name", level=["int8", "int4"])
def test_a_level_computes_with_its_weights_and_is_undone_exactly(name: str, level: str) -> None:
    llm = tiny_llm(name)
    native, before = logits(llm), weights_hash(llm.model)
    llm.apply(uniform(level, "int8"))
    packed = logits(llm)
    assert not torch.allclose(packed, native, rtol=1e-4, atol=1e-4)
    reference = tiny_model(name)
    replace_by_widened(reference, llm.model)
    # Float32 sums in another order.
    assert torch.allclose(packed, logits(reference), rtol=1e-4, atol=1e-4)
    llm.apply(Plan())
    assert torch.equal(logits(llm), native)
    assert weights_hash(llm.model) == before
    assert not any(isinstance(module, PackedModule) for module in llm.model.modules())


def replace_by_widened(model: torch.nn.Module, packed: torch.nn.Module) -> None:
    """Give a model the widened weights of another one with packed modules."""
    for path, module in packed.named_modules():
        if isinstance(module, PackedModule):
            target = model.get_submodule(path)
            for name, matrix in module.matrices.items():
                own, wide = target.get_parameter(name), matrix.widened(module.dtype)
                with torch.no_grad():
                    turned = type(target).__name__ == "Conv1D"  # weights (in, out)
                    own.copy_(wide.T if turned else wide.view_as(own))


@EVERY_FAMILY
def test_the_state_depends_on_the_plan_alone(name: str) -> None:
    llm, fresh = tiny_llm(name), tiny_llm(name)
    for plan in (uniform("int8"), Plan.removing(0, 1), uniform("int4", "int4"), Plan.removing(3)):
        llm.apply(plan)
    apply_to(MIXED, llm, fresh)
    with llm.applied(uniform("int4")), fresh.applied(uniform("int4")):
        assert torch.equal(logits(llm), logits(fresh))
    assert llm.plan == MIXED
    assert torch.equal(logits(llm), logits(fresh))


@pytest.mark.parametrize("residency", ["resident", "offload"])
def test_an_unknown_level_changes_nothing(residency: str) -> None:
    llm = tiny_llm()
    llm.set_residency(residency)
    llm.apply(MIXED)
    held, before = llm.held_bytes, logits(llm)
    llm.weight_items[2].levels.pop("int4")  # as if it took no fewer bytes
    for plan in (uniform("int4"), Plan.of({"layer07.ffn": "int4"})):
        with pytest.raises(UnknownNameError):
            llm.apply(plan)
        assert (llm.plan, llm.held_bytes) == (MIXED, held)
        assert torch.equal(logits(llm), before)


def test_a_pruned_block_has_no_levels(tmp_path: Path) -> None:
    from rap_env.models.files.pruned_checkpoint import load_pruned, save_pruned

    save_pruned(tiny_llm(), Plan.removing(1), tmp_path / "pruned")
    llm = load_pruned(tmp_path / "pruned")
    assert all(sizes[1] == 0 for sizes in llm.facts.level_param_bytes.values())
    with pytest.raises(UnknownNameError, match="level of weights 'int4'"):
        llm.apply(Plan.of({"layer00.ffn": "int4"}))
    llm.apply(Plan.of({"layer01.ffn": "int4"}))
