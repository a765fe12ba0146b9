"""Scores of plans: shared, and stored apart from those of masks."""

from rap_env.plan import Plan
from rap_env.scoring.scorer import METRIC, MaskScorer
from rap_env.scoring.store import ScoreStore
from tests.scoring.test_scorer import plans_for, text
from tests.tiny import tiny_llm


def test_plans_are_stored_beside_masks_and_not_run_again(tmp_path):
    llm, ids = tiny_llm(), text()
    plans = plans_for(llm)
    first = MaskScorer(llm, ids, ScoreStore(tmp_path / "s.sqlite"))
    values = first.nll_many(plans)
    again = MaskScorer(llm, ids, ScoreStore(tmp_path / "s.sqlite"))
    assert again.nll_many(plans) == values
    assert again.evaluations == again.block_forwards == 0
    stored = dict(again.store.rows(again.context, METRIC))
    assert stored == {plan: again.window_nll(plan).tolist() for plan in plans}


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
