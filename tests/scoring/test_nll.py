"""The loss in small pieces is the loss, and a part of the vocabulary bounds it."""

import pytest
import torch
from torch.nn import functional

from rap_env.models.live.partial_forward import PartialForward
from rap_env.plan import Plan
from rap_env.scoring import nll as nll_module
from rap_env.scoring.nll import VocabularyBound, token_nll, window_nll
from tests.scoring.test_scorer import tokens
from tests.tiny import each_family, tiny_llm


def passed(llm, ids, mask=Plan()):
    with torch.inference_mode(), llm.masked(mask):
        return llm.adapter.decoder(llm.model)(input_ids=ids, use_cache=False).last_hidden_state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_tokens", [1, 5, 256])
def test_the_loss_in_pieces_equals_the_loss(dtype, head_tokens, monkeypatch):
    monkeypatch.setattr(nll_module, "HEAD_TOKENS", head_tokens)
    llm, ids = tiny_llm(dtype=dtype), tokens()
    with torch.inference_mode():
        logits = llm.model(ids).logits[:, :-1].double()
    expected = functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1), reduction="none"
    ).view(3, -1)
    found = window_nll(PartialForward(llm), passed(llm, ids), ids)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected.mean(dim=1).tolist(), rel=1e-5)


def test_float32_logits_are_computed_in_small_slices(monkeypatch):
    seen = []
    plain = functional.cross_entropy

    def watched(rows, *args, **kwargs):
        seen.append((rows.dtype, len(rows)))
        return plain(rows, *args, **kwargs)

    monkeypatch.setattr(functional, "cross_entropy", watched)
    token_nll(torch.randn(100, 7).bfloat16(), torch.zeros(100, dtype=torch.long))
    assert {dtype for dtype, _ in seen} == {torch.float32}
    assert max(rows for _, rows in seen) == 16


@each_family("family", dtype=[torch.float32, torch.bfloat16])
def test_a_part_of_the_vocabulary_bounds_the_loss(family, dtype):
    llm, ids = tiny_llm(family, dtype=dtype), tokens()
    partial = PartialForward(llm)
    bound = VocabularyBound(partial, [passed(llm, ids)], [ids])
    for mask in (Plan(), Plan.removing(1), Plan.removing(0, 3)):
        hidden = passed(llm, ids, mask)
        whole = window_nll(partial, hidden, ids)
        part = bound.window_nll(0, hidden)
        assert bool((part <= whole + bound.tolerance).all())
        assert bool((part > 0.3 * whole).all())  # close enough to be of use


def test_all_of_the_vocabulary_is_the_loss_itself(monkeypatch):
    monkeypatch.setattr(nll_module, "_VOCABULARY_PARTS", 1)
    llm, ids = tiny_llm("gemma2"), tokens()  # with a soft cap
    partial, hidden = PartialForward(llm), passed(llm, ids)
    bound = VocabularyBound(partial, [hidden], [ids])
    whole = window_nll(partial, hidden, ids)
    assert bound.window_nll(0, hidden).tolist() == pytest.approx(whole.tolist(), rel=1e-6)
