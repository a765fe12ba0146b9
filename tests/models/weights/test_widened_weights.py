"""Packed modules that run with widened weights, kept or not."""

import gc

import pytest
import torch

from rap_env.models.families.adapter import adapter_for
from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.live.partial_forward import PartialForward, WidenedWeights
from rap_env.models.weights.packed_modules import PackedModule, from_matrices, packable, packed
from rap_env.plan import Plan
from rap_env.scoring.mask_search import find_best_mask
from rap_env.scoring.scorer import MaskScorer
from tests.models.live.test_partial_forward import by_blocks
from tests.scoring.test_scorer import tokens
from tests.tiny import DISTINCT_FAMILIES, each_family, tiny_model

MASKS = [Plan(), Plan.removing(1), Plan.removing(2), Plan.removing(0, 3)]


def packed_llm(family="llama", level="int4", wide=False, dtype=torch.bfloat16):
    """A model whose native blocks are packed, or have the weights that packed ones widen to."""
    model = tiny_model(family, dtype=dtype)
    for layer in adapter_for(model.config).layers(model):
        for parent, name, child in list(packable(layer)):
            module = packed(child, level)
            setattr(parent, name, module.widened() if wide else module)
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
            with llm.masked(mask):
                assert torch.equal(partial.hidden(ids), by_blocks(wide, ids, mask)), mask
        del partial


def test_weights_are_widened_once_within_the_limit_and_freed_afterwards():
    llm, ids = packed_llm(), tokens()
    partial = PartialForward(llm, widen=True)
    kept = WidenedWeights.of(llm.model)
    widened = []
    for module in packed_in(llm):
        make = module.widened
        module.widened = lambda make=make: widened.append(1) or make()
    by_blocks(partial, ids, Plan())
    by_blocks(partial, ids, Plan.removing(1))
    assert len(widened) == len(packed_in(llm)) == 14
    assert kept.held_bytes == 2 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24) * 2  # bfloat16
    kept.clear()
    kept.max_bytes = 16 * 16 * 2  # one matrix
    by_blocks(partial, ids, Plan())
    by_blocks(partial, ids, Plan())
    assert len(widened) == 14 + 1 + 2 * 13
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


def test_a_packed_head_is_widened_and_has_its_rows():
    model = tiny_model("llama_tied", dtype=torch.bfloat16)
    rows = packed(model.get_input_embeddings(), "int8")
    head = from_matrices(model.get_output_embeddings(), rows.matrices)
    model.set_input_embeddings(rows)
    model.set_output_embeddings(head)
    llm = ElasticLLM(model, None, name="packed")
    partial, states = PartialForward(llm, widen=True), torch.randn(40, 16).bfloat16()
    assert torch.equal(partial.head.weight, head.widened().weight)
    assert torch.equal(partial.logits(states), head.widened()(states))
    assert partial.head is partial.head
    assert PartialForward(llm).head is head


def test_a_packed_model_is_scored_as_one_with_its_widened_weights():
    packed_one, wide = packed_llm("llama_tied"), packed_llm("llama_tied", wide=True)
    masks, ids = [Plan.removing(1, index) for index in (0, 2, 3)], tokens(windows=4, length=20)
    scorer, reference = MaskScorer(packed_one, ids), MaskScorer(wide, ids)
    assert scorer.nll_many(MASKS) == reference.nll_many(MASKS)
    found = find_best_mask(scorer, masks, near=Plan.removing(1))
    expected = find_best_mask(reference, masks, near=Plan.removing(1))
    assert (found.best, found.nll) == (expected.best, expected.nll)
    assert scorer.context != reference.context
    assert WidenedWeights.of(packed_one.model).held_bytes > 0
    scorer.release()
    assert WidenedWeights.of(packed_one.model).held_bytes == scorer.runner.cache.held_bytes == 0
