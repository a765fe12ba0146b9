"""Packed modules in models of all families: equal to widened ones, with exact bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from rap_env.errors import ArtifactError
from rap_env.models.families.adapter import adapter_for
from rap_env.models.weights.packed_layout import PACKED_LEVELS, PackedLevel, packed_bytes
from rap_env.models.weights.packed_modules import (
    PackedExperts,
    PackedLinear,
    PackedModule,
    from_matrices,
    from_tensors,
    matrices_of,
    packable,
    packed,
)
from tests import tiny

IDS = torch.randint(3, tiny.VOCAB_SIZE, (2, 7), generator=torch.Generator().manual_seed(0))
Place = tuple[nn.Module, str, nn.Module]


def _places(model: Any) -> list[Place]:
    sites = adapter_for(model.config).sites(model)
    slots = [slot for site in sites for slot in site.slots]
    return [p for slot in slots for p in packable(slot.original, slot.parent, slot.attribute)]


def _pack(places: list[Place], level: PackedLevel) -> list[PackedModule]:
    modules = [packed(child, level) for _, _, child in places]
    _put(places, modules)
    return modules


def _put(places: list[Place], modules: list[Any]) -> None:
    for (parent, attribute, _), module in zip(places, modules, strict=True):
        parent._modules[attribute] = module


@torch.inference_mode()
def _logits(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(IDS, use_cache=False).logits
    return logits


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("level", PACKED_LEVELS)
def test_every_family_computes_with_packed_blocks(family: str, level: PackedLevel) -> None:
    model = tiny.tiny_model(family)
    native = _logits(model)
    places = _places(model)
    modules = _pack(places, level)
    found = _logits(model)
    _put(places, [module.widened() for module in modules])
    assert not any(isinstance(module, PackedModule) for module in model.modules())
    # Sums in another order, in float32.
    assert torch.allclose(found, _logits(model), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, native, rtol=1e-4, atol=1e-4)
    _put(places, [child for _, _, child in places])
    assert torch.equal(_logits(model), native)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_all_weights_of_blocks_are_packed_except_gates(family: str) -> None:
    model = tiny.tiny_model(family)
    blocks = [module for site in adapter_for(model.config).sites(model) for module in site.modules]
    own = {id(p): p for module in blocks for p in module.parameters()}
    taken = {id(p) for _, _, child in _places(model) for p in child.parameters()}
    left = [tuple(p.shape) for key, p in own.items() if key not in taken]
    # Norms, and in mixtures of experts the router and the gate of the shared expert.
    assert all(len(shape) == 1 or shape in ((4, 16), (1, 16)) for shape in left)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("level", PACKED_LEVELS)
def test_bytes_and_tensors(family: str, level: PackedLevel) -> None:
    for _, _, child in _places(tiny.tiny_model(family)):
        module = packed(child, level)
        stored = sum(t.untyped_storage().nbytes() for t in module.tensors().values())
        shapes = [(w.shape[0], w.shape[1]) for w in matrices_of(child).values()]
        assert stored == sum(packed_bytes(level, shape) for shape in shapes)
        assert {name: tuple(t.shape) for name, t in module.state_dict().items()} == {
            **{name: tuple(t.shape) for name, t in module.tensors().items()},
            **({"bias": tuple(_bias(child).shape)} if _bias(child) is not None else {}),
        }
        same = from_tensors(child, level, module.tensors())
        for (name, wanted), found in zip(
            module.matrices.items(), same.matrices.values(), strict=True
        ):
            assert torch.equal(found.widened(torch.float32), wanted.widened(torch.float32)), name
        with pytest.raises(ArtifactError, match="codes"):
            from_tensors(child, level, {})


def _bias(child: Any) -> Any:
    return getattr(child, "bias", None)


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("level", PACKED_LEVELS)
def test_embeddings_and_head(family: str, level: PackedLevel) -> None:
    model = tiny.tiny_model(family)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    rows = packed(embedding, level)
    tied = head.weight is embedding.weight
    products = from_matrices(head, rows.matrices) if tied else packed(head, level)
    model.set_input_embeddings(rows)
    model.set_output_embeddings(products)
    found = _logits(model)
    embedding.weight = nn.Parameter(rows.matrices["weight"].widened(rows.dtype), False)
    model.set_input_embeddings(embedding)
    model.set_output_embeddings(products.widened())
    assert torch.allclose(found, _logits(model), rtol=1e-4, atol=1e-4)


def test_a_gemma_embedding_keeps_its_factor() -> None:
    embedding = tiny.tiny_model("gemma3_text").get_input_embeddings()
    module = packed(embedding, "int8")
    native = embedding(IDS).detach()
    assert torch.allclose(module(IDS), native, atol=0.02 * float(native.max()))
    embedding.weight = nn.Parameter(module.matrices["weight"].widened(torch.float32), False)
    assert torch.equal(module(IDS), embedding(IDS))


def test_scales_keep_their_dtype_when_the_model_changes_its_own() -> None:
    module = packed(nn.Linear(32, 64), "int4")
    before = module(torch.ones(1, 32))
    module.to(torch.float64).to(torch.float32)
    assert {t.dtype for t in module.tensors().values()} == {torch.uint8, torch.bfloat16}
    assert torch.equal(module(torch.ones(1, 32)), before)


def test_a_packed_module_follows_its_tensors_to_another_device() -> None:
    module = packed(nn.Linear(32, 64), "int4").to("meta")
    assert isinstance(module, PackedLinear)
    assert module(torch.ones(1, 32, device="meta")).device.type == "meta"
    assert {t.device.type for t in module.tensors().values()} == {"meta"}


def test_experts_hold_no_widened_weights_between_calls() -> None:
    model = tiny.tiny_model("mixtral")
    modules = [m for m in _pack(_places(model), "int4") if isinstance(m, PackedExperts)]
    assert len(modules) == tiny.LAYERS
    _logits(model)
    for module in modules:
        assert list(module.parameters()) == []
        assert all(value is None for value in module._child[0]._parameters.values())


def test_a_module_that_is_packed_itself_needs_a_parent() -> None:
    with pytest.raises(ValueError, match="Linear can be packed only in its parent"):
        list(packable(nn.Linear(2, 2)))
