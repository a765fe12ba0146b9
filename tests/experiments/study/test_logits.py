"""Logits of a plan differ from those of the model as it is by what the scorer measures."""

from functools import partial

import pytest

from experiments.config.program_settings import EvaluateConfig
from experiments.contexts import build_context, load_text
from experiments.study.logits import compared, window_logits
from rap_env.plan import Plan
from rap_env.scoring.native_agreement import AgreementScorer
from tests.experiments.tiny_study import own_text, tiny_study


def test_losses_and_agreement_are_those_of_the_scorer(tmp_path):
    text = EvaluateConfig(text=own_text(3, 44, 1))
    config = tiny_study(tmp_path, layers=3, stage="equal_process", store=None, evaluate=text)
    llm = build_context(config).llm
    text = load_text(config.evaluate.text, "report", llm)
    scorer, plan = (
        AgreementScorer(llm, text),
        Plan.of({"layer01.ffn": "int4", "layer02.attn": "int8"}),
    )
    native = map(partial(window_logits, llm, Plan()), text.tokens)
    found = compared(native, text.tokens, partial(window_logits, llm, plan), 1)
    rise, agreement = scorer.window_nll(plan) - scorer.window_nll(Plan()), scorer.agreement(plan)
    assert found["window_delta_nll"] == pytest.approx(rise.tolist(), abs=1e-5)
    assert found["kl_divergence_mean"] == pytest.approx(agreement.kl_divergence_mean, abs=1e-6)
    assert found["kl_divergence_p99"] == pytest.approx(agreement.kl_divergence_p99, abs=1e-5)
    assert found["same_top_token_share"] == agreement.same_top_token_share
    assert agreement.kl_divergence_mean > 0
