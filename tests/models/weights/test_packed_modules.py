"""Packed modules in models of all families: equal to widened ones, with exact bytes."""

import gc
from typing import Any

import pytest
import torch
from torch import nn

from rap_env.errors import ArtifactError
from rap_env.models.families.families import Slot, adapter_for
from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.live.partial_forward import PartialForward, WidenedWeights
from rap_env.models.weights.low_bits import packed_bytes
from rap_env.models.weights.packed_modules import (
    PackedExperts,
    PackedModule,
    from_matrices,
    from_tensors,
    matrices_of,
)
from rap_env.models.weights.packing import PACKED_LEVELS, PackedLevel
from rap_env.models.weights.quantisers import quantise
from rap_env.models.weights.weight_levels import packable_slots
from rap_env.plan import Plan
from rap_env.scoring.scorer import PlanScorer
from tests.models.live.test_partial_forward import by_blocks
from tests.scoring.test_scorer import tokens
from tests.tiny import DISTINCT_FAMILIES, FAMILIES, LAYERS, VOCAB_SIZE, each_family, tiny_model

IDS = torch.randint(3, VOCAB_SIZE, (2, 7), generator=torch.Generator().manual_seed(0))
Place = tuple[nn.Module, str, nn.Module]


def packed(child: nn.Module, level: PackedLevel) -> PackedModule:
    """The packed module for a module that can be packed."""
    weights = matrices_of(child).items()
    return from_matrices(child, {name: quantise(weight, level) for name, weight in weights})


def _places(model: Any) -> list[Place]:
    sites = adapter_for(model.config).sites(model)
    slots = [slot for site in sites for slot in site.slots]
    places = [place for slot in slots for place in packable_slots(slot)]
    return [(place.parent, place.attribute, place.original) for place in places]


@torch.inference_mode()
def _logits(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(IDS, use_cache=False).logits
    return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_all_weights_of_blocks_are_packed_except_gates(family: str) -> None:
    model = tiny_model(family)
    blocks = [module for site in adapter_for(model.config).sites(model) for module in site.modules]
    own = {id(p): p for module in blocks for p in module.parameters()}
    taken = {id(p) for _, _, child in _places(model) for p in child.parameters()}
    left = [tuple(p.shape) for key, p in own.items() if key not in taken]
    # Norms, and in mixtures of experts the router and the gate of the shared expert.
    assert all(len(shape) == 1 or shape in ((4, 16), (1, 16)) for shape in left)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("level", PACKED_LEVELS)
def test_bytes_and_tensors(family: str, level: PackedLevel) -> None:
    for _, _, child in _places(tiny_model(family)):
        module = packed(child, level)
        stored = sum(t.untyped_storage().nbytes() for t in module.tensors().values())
        shapes = [(w.shape[0], w.shape[1]) for w in matrices_of(child).values()]
        assert stored == sum(packed_bytes(level, shape) for shape in shapes)
        assert {name: tuple(t.shape) for name, t in module.state_dict().items()} == {
            **{name: tuple(t.shape) for name, t in module.tensors().items()},
            **({"bias": tuple(_bias(child).shape)} if _bias(child) is not None else {}),
        }
        same = from_tensors(child, level, module.tensors())
        for (name, expected), actual in zip(
            module.matrices.items(), same.matrices.values(), strict=True
        ):
            assert torch.equal(actual.widened(torch.float32), expected.widened(torch.float32)), name
        with pytest.raises(ArtifactError, match="codes"):
            from_tensors(child, level, {})


def _bias(child: Any) -> Any:
    return getattr(child, "bias", None)


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("level", PACKED_LEVELS)
def test_embeddings_and_head(family: str, level: PackedLevel) -> None:
    model = tiny_model(family)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    rows = packed(embedding, level)
    tied = head.weight is embedding.weight
    products = from_matrices(head, rows.matrices) if tied else packed(head, level)
    model.set_input_embeddings(rows)
    model.set_output_embeddings(products)
    actual = _logits(model)
    embedding.weight = nn.Parameter(rows.matrices["weight"].widened(rows.dtype), False)
    model.set_input_embeddings(embedding)
    model.set_output_embeddings(products.widened())
    assert torch.allclose(actual, _logits(model), rtol=1e-4, atol=1e-4)


def test_scales_keep_their_dtype_when_the_model_changes_its_own() -> None:
    module = packed(nn.Linear(32, 64), "int4")
    before = module(torch.ones(1, 32))
    module.to(torch.float64).to(torch.float32)
    assert {t.dtype for t in module.tensors().values()} == {torch.uint8, torch.bfloat16}
    assert torch.equal(module(torch.ones(1, 32)), before)


def test_experts_hold_no_widened_weights_between_calls() -> None:
    model = tiny_model("mixtral")
    for parent, attribute, child in _places(model):
        parent._modules[attribute] = packed(child, "int4")
    modules = [module for module in model.modules() if isinstance(module, PackedExperts)]
    assert len(modules) == LAYERS
    _logits(model)
    for module in modules:
        assert list(module.parameters()) == []
        assert all(value is None for value in module._child[0]._parameters.values())


MASKS = [Plan(), Plan.removing(1), Plan.removing(2), Plan.removing(0, 3)]


def packed_llm(family="llama", level="int4", wide=False, dtype=torch.bfloat16):
    """A model whose native blocks are packed, or have the weights that packed ones widen to."""
    model = tiny_model(family, dtype=dtype)
    for layer in adapter_for(model.config).layers(model):
        for slot in list(packable_slots(Slot(layer, "", layer))):
            module = packed(slot.original, level)
            setattr(slot.parent, slot.attribute, module.widened() if wide else module)
    return ElasticLLM(model, None, name="packed")


def packed_in(llm):
    return [m for m in llm.model.modules() if isinstance(m, PackedModule)]


@each_family("family", DISTINCT_FAMILIES, level=["int8", "int4"])
def test_packed_blocks_run_as_their_widened_weights_do(family, level):
    llm, ids = packed_llm(family, level), tokens()
    wide = PartialForward(packed_llm(family, level, wide=True))
    assert packed_in(llm)
    for limit in (0, 2**30):
        partial = PartialForward(llm, widen=True)
        WidenedWeights.of(llm.model).max_bytes = limit
        for mask in MASKS:
            assert torch.equal(by_blocks(partial, ids, mask), by_blocks(wide, ids, mask)), mask
            with llm.applied(mask):
                assert torch.equal(partial.hidden(ids), by_blocks(wide, ids, mask)), mask
        del partial


def test_widened_weights_are_kept_within_the_limit_and_freed_afterwards():
    llm, ids = packed_llm(), tokens()
    partial = PartialForward(llm, widen=True)
    kept = WidenedWeights.of(llm.model)
    by_blocks(partial, ids, Plan())
    assert kept.held_bytes == 2 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24) * 2  # bfloat16
    kept.clear()
    kept.max_bytes = 16 * 16 * 2  # one matrix
    by_blocks(partial, ids, Plan())
    assert kept.held_bytes == kept.max_bytes
    partial.release()
    assert kept.held_bytes == 0


def test_users_of_one_model_share_what_is_kept():
    llm = packed_llm()
    first, second = PartialForward(llm, widen=True), PartialForward(llm, widen=True)
    first.run((0,), first.enter(tokens()))
    held = WidenedWeights.of(llm.model).held_bytes
    second.run((0,), first.enter(tokens()))
    assert WidenedWeights.of(llm.model).held_bytes == held > 0
    del first, second
    gc.collect()
    assert WidenedWeights.of(llm.model).held_bytes == 0


def test_modules_are_left_as_they_were():
    llm, ids = packed_llm(), tokens()
    by_blocks(PartialForward(llm, widen=True), ids, Plan())
    broken = packed_in(llm)[0]
    broken.widened = None
    with pytest.raises(TypeError):
        by_blocks(PartialForward(llm, widen=True), ids, Plan())
    assert all("forward" not in module.__dict__ for module in packed_in(llm))


def test_a_packed_model_is_scored_as_one_with_its_widened_weights():
    packed_one, wide = packed_llm("llama_tied"), packed_llm("llama_tied", wide=True)
    ids = tokens(windows=4, length=20)
    scorer, reference = PlanScorer(packed_one, ids), PlanScorer(wide, ids)
    assert scorer.nll_many(MASKS) == reference.nll_many(MASKS)
    assert scorer.context != reference.context
    assert WidenedWeights.of(packed_one.model).held_bytes > 0
    scorer.release()
    assert WidenedWeights.of(packed_one.model).held_bytes == scorer.runner.cache.held_bytes == 0
