"""Passes a block at a time are the model's own passes, bit for bit."""

import pytest
import torch

from rap_env.models.live.partial_forward import PartialForward
from rap_env.plan import Plan
from tests.scoring.test_scorer import tokens
from tests.tiny import each_family, tiny_llm

MASKS = [Plan(), Plan.removing(0), Plan.removing(1), Plan.removing(2), Plan.removing(1, 2),
         Plan.removing(0, 1), Plan.removing(0, 1, 2, 3)]  # fmt: skip


def by_blocks(partial, ids, mask):
    state = partial.enter(ids)
    for step in partial.steps:
        state = partial.run(step, state, mask)
    return partial.leave(state)


@each_family("family", dtype=[torch.float32, torch.bfloat16])
def test_blocks_run_one_by_one_equal_the_full_pass(family, dtype):
    llm, ids = tiny_llm(family, dtype=dtype), tokens()
    partial = PartialForward(llm)
    for mask in MASKS:
        with torch.inference_mode(), llm.applied(mask):
            decoder = llm.adapter.decoder(llm.model)
            expected = decoder(input_ids=ids, use_cache=False).last_hidden_state
            logits = llm.model(ids, use_cache=False).logits
            assert torch.equal(llm.hidden(ids), expected)
        actual = by_blocks(partial, ids, mask)
        assert torch.equal(actual, expected), mask
        head = partial.logits(actual.reshape(-1, actual.shape[-1])).view(logits.shape)
        assert torch.allclose(head, logits, atol=1e-6)


def test_parallel_blocks_are_one_step():
    assert PartialForward(tiny_llm("gpt_neox")).steps == ((0, 1), (2, 3))
    assert PartialForward(tiny_llm("gpt_neox_sequential")).steps == ((0,), (1,), (2,), (3,))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "opt", "gpt_neox"])
def test_other_shapes_and_the_mask_in_force_do_not_matter(family):
    llm = tiny_llm(family)
    partial = PartialForward(llm)
    for shape in ((1, 4), (5, 9), (1, 4)):
        ids = tokens(*shape)
        expected = by_blocks(PartialForward(llm), ids, Plan.removing(1))
        with llm.applied(Plan.removing(0, 3)):
            assert torch.equal(by_blocks(partial, ids, Plan.removing(1)), expected)
            assert llm.plan == Plan.removing(0, 3)


def test_the_model_is_left_as_it_was():
    llm, ids = tiny_llm(), tokens()
    partial = PartialForward(llm)
    with torch.inference_mode():
        before = llm.model(ids).logits
        by_blocks(partial, ids, Plan.removing(2))
        handle = llm.model.get_decoder().layers[0].mlp.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            by_blocks(partial, ids, Plan())
        handle.remove()
        assert torch.equal(llm.model(ids).logits, before)
    assert llm.plan == Plan()
