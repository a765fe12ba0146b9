"""Divergence of plans from the native model: known distributions, whole passes, stores, workers."""

import math

import numpy as np
import pytest
import torch

from rap_env.plan import Plan
from rap_env.scoring.native_agreement import (
    METRIC,
    AgreementScorer,
    NativeAgreement,
    TokenComparison,
    agreement_of,
)
from rap_env.scoring.scorer import PlanScorer
from rap_env.scoring.store import ScoreStore
from tests.scoring.test_scorer import plans_for, text
from tests.tiny import DISTINCT_FAMILIES, tiny_llm

NATIVE = NativeAgreement(0.0, 0.0, 1.0)


def test_divergences_of_known_distributions():
    even, skewed = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
    turned = torch.tensor([0.75, 0.25])
    first, second = Plan.removing(0), Plan.removing(1)
    comparison = TokenComparison(torch.stack([skewed, turned]).log(), [first, second])
    # Two tokens of the first plan, then two of the second, in pieces that cut across them.
    comparison.add(torch.stack([even, turned, skewed]).log() + 3.0)  # a shift is no difference
    comparison.add(even[None].log())
    from_even = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    tokens = comparison.by_plan()
    np.testing.assert_allclose(tokens[first], [[from_even, 0.0], [0.0, 1.0]], atol=1e-6)
    np.testing.assert_allclose(tokens[second], [[0.0, from_even], [1.0, 1.0]], atol=1e-6)
    agreement = agreement_of(tokens[first])
    assert agreement.kl_divergence_mean == pytest.approx(from_even / 2)
    assert agreement.kl_divergence_p99 == pytest.approx(0.99 * from_even, rel=1e-5)
    assert agreement.same_top_token_share == 0.5


@pytest.mark.parametrize("family", DISTINCT_FAMILIES)
def test_plans_are_compared_with_whole_passes_of_the_model(family):
    llm, ids = tiny_llm(family), text(windows=3)
    scorer, plain = (
        AgreementScorer(llm, ids, batch_tokens=50),
        PlanScorer(llm, ids, batch_tokens=50),
    )
    assert scorer.agreement(Plan()) == NATIVE
    for plan in plans_for(llm):
        assert np.array_equal(scorer.window_nll(plan), plain.window_nll(plan))
    mask = Plan.removing(1)
    logs = []
    for plan in (Plan(), mask):
        with llm.applied(plan), torch.no_grad():
            logs.append(llm.model(ids).logits[:, :-1].double().log_softmax(-1).flatten(0, 1))
    native, ours = logs
    divergence = (native.exp() * (native - ours)).sum(-1).numpy()
    agreement = scorer.agreement(mask)
    assert agreement.kl_divergence_mean == pytest.approx(divergence.mean(), rel=1e-3)
    assert agreement.kl_divergence_p99 == pytest.approx(np.quantile(divergence, 0.99), rel=1e-3)
    same = (native.argmax(-1) == ours.argmax(-1)).double().mean().item()
    assert agreement.same_top_token_share == same < 1


@pytest.mark.parametrize("together", [1, 3])
def test_plans_that_share_a_batch_are_compared_one_by_one(together):
    llm, ids = tiny_llm("llama_tied"), text(windows=2)
    plans = [Plan(), Plan.removing(0), Plan.removing(3), Plan(embeddings="int8")]
    plans.append(plans[-1].without(2))
    alone = [AgreementScorer(llm, ids).agreement(plan) for plan in plans]
    scorer = AgreementScorer(llm, ids, masks_together=together)
    scorer.nll_many(plans)
    for plan, expected in zip(plans, alone, strict=True):
        agreement = scorer.agreement(plan)
        assert agreement.kl_divergence_mean == pytest.approx(expected.kl_divergence_mean, abs=1e-5)
        assert agreement.same_top_token_share == expected.same_top_token_share
    assert alone[0] == NATIVE
    assert 0 < alone[3].kl_divergence_mean < alone[1].kl_divergence_mean
    scorer.release()
    assert scorer.agreement(plans[1]) == scorer.agreement(plans[1])


def test_agreements_are_stored_and_losses_of_older_stores_are_kept(tmp_path):
    llm, ids = tiny_llm(), text()
    plans = [Plan(), Plan.removing(1), Plan.of({"layer00.cache": "int4"})]
    store = ScoreStore(tmp_path / "scores.sqlite")
    nll = PlanScorer(llm, ids, store).nll_many(plans)
    first = AgreementScorer(llm, ids, store)
    assert first.nll_many(plans) == nll
    assert first.evaluations == 3, "the store has no agreement yet"
    again = AgreementScorer(llm, ids, store)
    assert [again.agreement(plan) for plan in plans] == [first.agreement(plan) for plan in plans]
    assert again.evaluations == 0
    assert again.look_up(Plan.removing(2)) is None
    assert store.get(again.context, plans[0], METRIC) == [0.0, 0.0, 1.0]
