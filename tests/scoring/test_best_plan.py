"""The search drops masks early, by bounds of their loss, and still finds the best of all."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from rap_env.errors import NonFiniteScoreError
from rap_env.models.live.partial_forward import PartialForward
from rap_env.plan import Plan
from rap_env.scoring import nll as nll_module
from rap_env.scoring.best_plan import _Search, find_best_plan
from rap_env.scoring.nll import VocabularyBound, window_nll
from rap_env.scoring.scorer import MaskScorer
from tests.scoring.removals import removals
from tests.scoring.test_scorer import tokens
from tests.tiny import DISTINCT_FAMILIES, each_family, tiny_llm

BASE = Plan.removing(3)


def scorers(family="llama", layers=5, dtype=torch.float32, windows=4):
    """Two scorers with empty caches: one to search with, one to measure all masks with."""
    llm, ids = tiny_llm(family, layers=layers, dtype=dtype), tokens(windows=windows)
    return [MaskScorer(llm, ids, batch_tokens=18) for _ in range(2)]


@each_family("family", DISTINCT_FAMILIES, near=[BASE, None], dtype=[torch.float32, torch.bfloat16])
def test_the_search_finds_the_best_of_all_masks(family, near, dtype):
    scorer, plain = scorers(family, dtype=dtype)
    masks = list(removals(scorer.llm.num_blocks, BASE).values())
    nll = plain.nll_many(masks)
    race = find_best_plan(scorer, masks, near=near)
    assert race.nll[masks[int(np.argmin(nll))]] == min(nll) == min(race.nll.values())
    for mask, value in zip(masks, nll, strict=True):
        if mask in race.nll:
            assert race.nll[mask] == value  # bit for bit what a single pass gives
        else:
            assert race.lower_bounds[mask] <= value + 2e-3
    assert set(race.nll) | set(race.lower_bounds) == set(masks)


def test_masks_that_cannot_win_are_dropped(monkeypatch):
    monkeypatch.setattr(nll_module, "_VOCABULARY_PARTS", 1)  # a tight bound
    scorer, plain = scorers(layers=8)
    masks = sorted(
        removals(scorer.llm.num_blocks, BASE).values(), key=plain.nll
    )  # likely winners first
    ticks = []
    race = find_best_plan(scorer, masks, near=BASE, on_score=ticks.append)
    assert len(race.lower_bounds) > len(masks) // 2
    assert ticks == masks
    assert scorer.evaluations == len(masks)
    assert all(scorer.look_up(mask) is None for mask in race.lower_bounds)


def test_known_masks_are_not_run_again():
    scorer, _ = scorers()
    masks = list(removals(scorer.llm.num_blocks, BASE).values())
    nll = scorer.nll_many(masks)
    ran = scorer.evaluations, scorer.block_forwards
    race = find_best_plan(scorer, masks)
    assert race.nll == dict(zip(masks, nll, strict=True))
    assert (scorer.evaluations, scorer.block_forwards) == ran


def test_the_next_round_starts_from_the_winners_states():
    scorer, plain = scorers(layers=8)
    nll = find_best_plan(scorer, list(removals(scorer.llm.num_blocks, BASE).values())).nll
    best = min(nll, key=nll.__getitem__)
    before = scorer.block_forwards
    alone = best.without(15)
    assert scorer.nll(alone) == plain.nll(alone)
    assert scorer.block_forwards == before  # the last block is gone: all before it is known


def test_non_finite_numbers_are_rejected():
    scorer, _ = scorers()
    scorer.llm.model.get_decoder().layers[4].mlp.down_proj.weight.data.fill_(float("nan"))
    with pytest.raises(NonFiniteScoreError, match="non-finite"):
        find_best_plan(scorer, list(removals(scorer.llm.num_blocks, BASE).values()))
    assert scorer.known == 0


@pytest.mark.parametrize("near", [BASE, None])
def test_what_masks_in_flight_hold_stays_within_the_cache(near, monkeypatch):
    """Decoder outputs of eight masks that advance together, on a text of twelve batches."""
    llm, ids = tiny_llm(layers=5), tokens(windows=24)
    text_bytes = ids.numel() * llm.facts.hidden_size * llm.facts.itemsize
    cap = 3 * text_bytes
    wide = MaskScorer(llm, ids, batch_tokens=18, masks_together=8, prefix_cache_bytes=cap)
    kept_bytes, run = [], _Search._run

    def noted(search, group, *arguments, **options):
        run(search, group, *arguments, **options)
        kept_bytes.append(sum(h.nbytes for each in group for h in each.hidden.values()))

    monkeypatch.setattr(_Search, "_run", noted)
    masks = list(removals(wide.llm.num_blocks, BASE).values())
    race = find_best_plan(wide, masks, near=near)
    assert len(wide.batches) == 12
    assert max(kept_bytes) <= cap
    assert min(race.nll.values()) == pytest.approx(min(MaskScorer(llm, ids).nll_many(masks)))


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
    race = window_nll(PartialForward(llm), passed(llm, ids), ids)
    assert race.dtype == torch.float64
    assert race.tolist() == pytest.approx(expected.mean(dim=1).tolist(), rel=1e-5)


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
