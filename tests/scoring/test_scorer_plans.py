"""Scores of plans: correct, shared bit for bit, stored beside those of masks, and searched."""

import itertools

import pytest
import torch

from rap_env.blocks import block_name
from rap_env.errors import UnknownNameError
from rap_env.plan import Plan, cache_name
from rap_env.scoring.mask_search import find_best_mask
from rap_env.scoring.scorer import METRIC, MaskScorer
from rap_env.scoring.store import ScoreStore, context_key
from tests.scoring.test_scorer import tokens
from tests.tiny import DISTINCT_FAMILIES, FAMILIES, each_family, tiny_llm

CACHES = {"layer00.cache": "int4", "layer01.cache": "int2"}


def text(windows=2, length=50, seed=0):
    """Windows that fill more than one group of a cache."""
    return tokens(windows, length, seed)


def plans_for(llm):
    """Plans that lower some of every kind of item that the model can lower, masks between them."""
    facts = llm.facts
    found = [
        Plan.of(CACHES),
        Plan.of({"layer00.cache": "int8", "layer01.ffn": "removed"}),
        Plan.removing(1),
        Plan.of({"layer01.cache": "int4-window32", "layer00.attn": "removed"}),
    ]
    for level in ("int8", "int4"):
        blocks = [i for i in range(facts.num_blocks) if level in facts.weight_levels(i)]
        if blocks:
            lowered = {block_name(i): level for i in blocks}
            found += [Plan.of(lowered), Plan.of({**lowered, **CACHES})]
            found.append(Plan.of({block_name(blocks[-1]): level}))
        if level in facts.embedding_levels:
            found.append(Plan.of({"embeddings": level, "layer00.ffn": "removed"}))
    return [*found, Plan()]


@each_family("family", DISTINCT_FAMILIES, dtype=[torch.float32, torch.bfloat16])
def test_what_plans_share_changes_no_bit(family, dtype):
    llm, ids = tiny_llm(family, dtype=dtype), text()
    plans = plans_for(llm)
    single = [MaskScorer(llm, ids).nll(plan) for plan in plans]
    assert MaskScorer(llm, ids).nll_many(plans) == single
    few = MaskScorer(llm, ids, prefix_cache_bytes=1)
    assert few.nll_many(plans[::-1]) == single[::-1]
    if dtype == torch.float32:
        assert len(set(single)) == len(plans)  # every level has an effect


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_of_plans_equal_the_models_own_loss(family):
    llm, ids = tiny_llm(family), text()
    scorer = MaskScorer(llm, ids)
    for plan in plans_for(llm):
        with torch.no_grad(), llm.masked(plan):
            expected = [
                float(llm.model(window[None], labels=window[None], use_cache=False).loss)
                for window in ids
            ]
        assert scorer.window_nll(plan) == pytest.approx(expected, rel=5e-4), plan


def test_a_plan_that_is_a_mask_has_the_masks_score_and_key(tmp_path):
    llm, ids, mask = tiny_llm(), text(), Plan.removing(0, 3)
    scorer = MaskScorer(llm, ids, ScoreStore(tmp_path / "s.sqlite"))
    values = scorer.nll_many([mask, mask, Plan()])
    assert scorer.evaluations == 2
    assert values[0] == values[1] == MaskScorer(llm, ids).nll(mask)
    assert values[2] == scorer.dense_nll
    key = context_key(scorer.context)
    rows = dict(scorer.store.rows(key, METRIC))
    assert rows[mask] == scorer.window_nll(mask).tolist()
    assert set(rows) == {mask, Plan()}


def test_plans_are_stored_beside_masks_and_not_run_again(tmp_path):
    llm, ids = tiny_llm(), text()
    plans = plans_for(llm)
    first = MaskScorer(llm, ids, ScoreStore(tmp_path / "s.sqlite"))
    values = first.nll_many(plans)
    again = MaskScorer(llm, ids, ScoreStore(tmp_path / "s.sqlite"))
    assert again.nll_many(plans) == values
    assert again.evaluations == again.block_forwards == 0
    masks = [plan for plan in plans if plan.is_mask]
    assert set(dict(again.store.rows(context_key(again.context), METRIC))) == set(masks)
    stored = dict(again.store.rows(context_key(again.plan_context), METRIC))
    assert set(stored) == set(plans) - set(masks)
    assert all(stored[p] == again.window_nll(p).tolist() for p in stored)


def test_plans_share_the_steps_before_the_first_that_differs():
    llm, ids = tiny_llm(layers=4), text()
    scorer = MaskScorer(llm, ids)
    scorer.nll_many([
        Plan(),
        Plan.of({"layer03.cache": "int4"}),  # blocks 6 and 7 run again
        Plan.of({"layer03.cache": "int8", "layer03.ffn": "removed"}),  # 6
        Plan.of({"layer03.cache": "int4", "layer03.ffn": "removed"}),  # none
        Plan.removing(7),  # none
    ])  # fmt: skip
    assert scorer.block_forwards == 8 + 2 + 1
    assert scorer.evaluations == 5
    assert scorer.full_block_forwards == 8 + 8 + 7 + 7 + 7


@pytest.mark.slow
def test_plans_run_next_to_those_with_which_they_share_most():
    llm, ids = tiny_llm(layers=4), text()
    base = Plan.of({"layer01.cache": "int4"})
    plans = [base.lower({cache_name(layer): "int8"}) for layer in (2, 3)]
    plans += [base.without(block) for block in (4, 5, 6, 7)]
    one_by_one = MaskScorer(llm, ids, prefix_cache_bytes=1)
    for plan in plans:
        one_by_one.nll(plan)
    ideal = min(
        _distinct_runs(llm, order) for order in itertools.islice(itertools.permutations(plans), 50)
    )
    together = MaskScorer(llm, ids)
    together.nll_many(plans)
    assert together.block_forwards <= ideal < one_by_one.block_forwards


def _distinct_runs(llm, plans):
    """Block runs if a state is kept for every node of the tree."""
    scorer = MaskScorer(llm, text())
    for plan in plans:
        scorer.nll(plan)
    return scorer.block_forwards


def test_plans_that_differ_in_the_embeddings_share_nothing():
    llm = tiny_llm("llama_tied")
    scorer = MaskScorer(llm, text())
    lowered = Plan(embeddings="int8")
    scorer.nll_many([Plan(), lowered, Plan.removing(3), lowered.without(3)])
    assert scorer.block_forwards == 4 + 4
    assert scorer.nll(lowered) != scorer.dense_nll


def test_levels_and_items_that_the_model_lacks():
    llm = tiny_llm()
    scorer = MaskScorer(llm, text())
    with pytest.raises(UnknownNameError, match=r"layer02\.attn"):
        scorer.nll(Plan.of({"layer02.cache": "int4"}))
    with pytest.raises(UnknownNameError, match="layer02"):
        scorer.nll_many([Plan.removing(4)])
    assert scorer.evaluations == 0


def test_a_scan_of_a_plan_removes_each_kept_block():
    llm = tiny_llm()
    scorer, plan = MaskScorer(llm, text()), Plan.of({**CACHES, "layer00.ffn": "removed"})
    scan = scorer.scan(plan)
    assert [block.name for block in scan] == ["layer00.attn", "layer01.attn", "layer01.ffn"]
    assert all(nll == scorer.nll(plan.lower({b.name: "removed"})) for b, nll in scan.items())


def test_parts_of_the_text_take_plans():
    llm, ids = tiny_llm(), text(windows=4)
    scorer, plan = MaskScorer(llm, ids), Plan.of(CACHES)
    nll = scorer.nll_on([plan, Plan(), plan], [1, 3])
    assert nll[0] == nll[2] == MaskScorer(llm, ids[[1, 3]]).nll(plan)
    scorer.nll(plan)
    assert scorer.nll_on([plan], [2]) == [scorer.window_nll(plan)[2]]


def test_searches_find_the_best_plan():
    llm, ids = tiny_llm(layers=4), text(windows=4)
    base = Plan.of({"layer01.cache": "int2"})
    plans = [base.without(i) for i in (1, 4, 6)] + [
        base.lower({"layer00.cache": "int2", "layer02.ffn": "removed"}),
        Plan.removing(5),
    ]
    expected = dict(zip(plans, MaskScorer(llm, ids).nll_many(plans), strict=True))
    best = min(expected, key=expected.get)
    for near in (None, base):
        found = find_best_mask(MaskScorer(llm, ids, batch_tokens=50), plans, near=near)
        assert Plan.from_json(found.best.to_json()) == best
        assert min(found.nll.values()) == pytest.approx(expected[best], rel=1e-6)
