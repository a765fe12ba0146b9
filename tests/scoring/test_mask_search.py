"""The search drops masks early and still finds what measuring all of them finds."""

import numpy as np
import pytest
import torch

from rap_env.errors import NonFiniteScoreError
from rap_env.plan import Plan
from rap_env.scoring import nll as nll_module
from rap_env.scoring.mask_search import (
    CandidateRunner,
    find_best_mask,
)
from rap_env.scoring.scorer import MaskScorer
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
    masks = list(scorer.candidates(BASE).values())
    nll = plain.nll_many(masks)
    found = find_best_mask(scorer, masks, near=near)
    assert found.best == masks[int(np.argmin(nll))]
    assert found.nll[found.best] == min(nll)
    for mask, value in zip(masks, nll, strict=True):
        if mask in found.nll:
            assert found.nll[mask] == value  # bit for bit what a single pass gives
        else:
            assert found.lower_bounds[mask] <= value + 2e-3
    assert set(found.nll) | set(found.lower_bounds) == set(masks)


def test_masks_that_cannot_win_are_dropped(monkeypatch):
    monkeypatch.setattr(nll_module, "_VOCABULARY_PARTS", 1)  # a tight bound
    scorer, plain = scorers(layers=8)
    masks = sorted(scorer.candidates(BASE).values(), key=plain.nll)  # likely winners first
    ticks = []
    found = find_best_mask(scorer, masks, near=BASE, on_score=ticks.append)
    assert len(found.lower_bounds) > len(masks) // 2
    assert ticks == masks
    assert scorer.evaluations == len(masks)
    assert all(scorer.look_up(mask) is None for mask in found.lower_bounds)


def test_known_masks_are_not_run_again():
    scorer, _ = scorers()
    masks = list(scorer.candidates(BASE).values())
    nll = scorer.nll_many(masks)
    ran = scorer.evaluations, scorer.block_forwards
    found = find_best_mask(scorer, masks)
    assert found.nll == dict(zip(masks, nll, strict=True))
    assert (scorer.evaluations, scorer.block_forwards) == ran


def test_the_next_round_starts_from_the_winners_states():
    scorer, plain = scorers(layers=8)
    best = find_best_mask(scorer, list(scorer.candidates(BASE).values())).best
    before = scorer.block_forwards
    alone = best.without(15)
    assert scorer.nll(alone) == plain.nll(alone)
    assert scorer.block_forwards == before  # the last block is gone: all before it is known


def test_a_single_mask_and_the_dense_model():
    scorer, plain = scorers()
    assert find_best_mask(scorer, [Plan()]).nll == {Plan(): plain.dense_nll}


def test_non_finite_numbers_are_rejected():
    scorer, _ = scorers()
    scorer.llm.model.get_decoder().layers[4].mlp.down_proj.weight.data.fill_(float("nan"))
    with pytest.raises(NonFiniteScoreError, match="non-finite"):
        find_best_mask(scorer, list(scorer.candidates(BASE).values()))
    assert scorer.known == 0


@pytest.mark.parametrize("near", [BASE, None])
def test_what_masks_in_flight_hold_stays_within_the_cache(near, monkeypatch):
    """Decoder outputs of eight masks that advance together, on a text of twelve batches."""
    llm, ids = tiny_llm(layers=5), tokens(windows=24)
    text_bytes = ids.numel() * llm.facts.hidden_size * llm.facts.itemsize
    cap = 3 * text_bytes
    wide = MaskScorer(llm, ids, batch_tokens=18, masks_together=8, prefix_cache_bytes=cap)
    held, evaluate = [], CandidateRunner.evaluate_batch

    def noted(runner, candidates, batch, **options):
        evaluate(runner, candidates, batch, **options)
        held.append(sum(h.nbytes for one in candidates for h in one.hidden.values()))

    monkeypatch.setattr(CandidateRunner, "evaluate_batch", noted)
    masks = list(wide.candidates(BASE).values())
    found = find_best_mask(wide, masks, near=near)
    assert len(wide.batches) == 12
    assert max(held) <= cap
    assert found.nll[found.best] == pytest.approx(min(MaskScorer(llm, ids).nll_many(masks)))
