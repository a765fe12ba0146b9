"""Scores of plans and of models with stubs: shared, stored apart from others, and searched."""

import torch

from rap_env.plan import Plan
from rap_env.repair.stub_library import StubLibrary
from rap_env.scoring.scorer import METRIC, MaskScorer
from rap_env.scoring.store import ScoreStore, context_key
from tests.models.stubs import random_stubs, repaired
from tests.scoring.test_scorer import MASKS, plans_for, text, tokens
from tests.tiny import tiny_llm


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


def test_plans_that_differ_in_the_embeddings_share_nothing():
    llm = tiny_llm("llama_tied")
    scorer = MaskScorer(llm, text())
    lowered = Plan(embeddings="int8")
    scorer.nll_many([Plan(), lowered, Plan.removing(3), lowered.without(3)])
    assert scorer.block_forwards == 4 + 4
    assert scorer.nll(lowered) != scorer.dense_nll


def test_a_stub_is_not_counted_as_a_block():
    llm, ids = tiny_llm(), tokens()
    ours, plain = MaskScorer(repaired(llm), ids), MaskScorer(llm, ids)
    for scorer in (ours, plain):
        scorer.nll_many(MASKS)
    assert ours.block_forwards == plain.block_forwards


def libraries(llm):
    """Two libraries that differ in one number."""
    first, second = random_stubs(llm), random_stubs(llm)
    with torch.no_grad():
        second[3].mean[5] += 1e-6
    return [StubLibrary(llm.name, llm.fingerprint, stubs) for stubs in (first, second)]


def test_the_context_depends_on_stubs_only_if_there_are_any():
    llm, ids = tiny_llm(), tokens()
    plain = MaskScorer(llm, ids).context
    assert "repair" not in plain
    one, two = (MaskScorer(library.attach(llm), ids).context for library in libraries(llm))
    assert len({context_key(context) for context in (plain, one, two)}) == 3
    assert {k: v for k, v in one.items() if k != "repair"} == plain
    assert one["repair"] == libraries(llm)[0].sha256
    # Stubs given twice are the same stubs.
    assert MaskScorer(libraries(llm)[0].attach(llm), ids).context == one
    assert MaskScorer(llm, ids).context == plain
