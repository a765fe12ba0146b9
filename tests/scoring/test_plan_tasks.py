"""Likelihoods of tasks under plans: padding does not matter, and plans have keys of their own."""

import numpy as np
import pytest

from rap_env.errors import UnknownNameError
from rap_env.plan import Plan
from rap_env.scoring.likelihoods import ContinuationScorer
from rap_env.scoring.lm_eval_tasks import TaskConfig
from rap_env.scoring.store import ScoreStore
from rap_env.scoring.task_results import TaskResult
from rap_env.scoring.tasks import TaskScorer
from tests.scoring.test_scorer import tokens
from tests.scoring.test_tasks import make_llm
from tests.tiny import FAMILIES, tiny_llm

CACHES = {"layer00.cache": "int4", "layer01.cache": "int2"}
CONFIG = TaskConfig(("rap_minimal_pairs", "rap_recall"), limit=4)


def requests():
    """Contexts and continuations of very different lengths, most longer than one cache group."""
    rows = tokens(6, 60).tolist()
    lengths = (58, 41, 34, 33, 20, 5)
    return [(row[: n - 2], row[n - 2 : n]) for row, n in zip(rows, lengths, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_scores_as_each_sequence_alone_under_lowered_caches(family):
    llm = tiny_llm(family)
    with llm.masked(Plan.of(CACHES)):
        together = ContinuationScorer(llm, requests(), 63)
        assert len(together._batches) == 1
        found = together.run()
        alone = [ContinuationScorer(llm, [request], 63).run()[0] for request in requests()]
    for one, other in zip(found, alone, strict=True):
        # Rounding may move a state across a step of its quantisation; int2 has large steps.
        assert one[0] == pytest.approx(other[0], rel=2e-3)


def test_tasks_are_scored_under_plans_and_stored_by_plan(tmp_path):
    llm = make_llm()
    plan, mask = Plan.of(CACHES), Plan.removing("layer00.attn")
    scorer = TaskScorer(llm, CONFIG, ScoreStore(tmp_path / "s.sqlite"))
    results = scorer.results(plan)
    assert scorer.accuracies(plan) == {n: r.metrics["acc"] for n, r in results.items()}
    assert 0 <= scorer.mean_accuracy(plan) <= 1
    assert scorer.results(mask) == scorer.results(mask)
    assert scorer.evaluations == 2
    again = TaskScorer(llm, CONFIG, ScoreStore(tmp_path / "s.sqlite"))
    for one in (plan, mask):
        metrics = {name: result.metrics for name, result in scorer.results(one).items()}
        assert metrics == {name: result.metrics for name, result in again.results(one).items()}
    assert again.evaluations == 0
    with pytest.raises(UnknownNameError, match=r"layer02\.attn"):
        scorer.results(Plan.of({"layer02.cache": "int4"}))


def result(name, acc, acc_norm=None, choices=True):
    """A result with these right answers, and nothing else of use."""
    values = {"acc": np.array(acc, dtype=float)}
    if acc_norm is not None:
        values["acc_norm"] = np.array(acc_norm, dtype=float)
    nll = np.zeros(len(acc) if choices else 0)
    return TaskResult(name, {}, {}, len(acc), values, nll)


def test_answers_are_compared_with_those_of_the_native_model(caplog):
    scorer, plan = TaskScorer(make_llm(), TaskConfig(("rap_minimal_pairs",), limit=2)), Plan()
    lowered = Plan.of(CACHES)
    scorer.chance = {"normed": 0.5, "plain": 0.25, "open": 0.0}
    scorer._results[plan] = {
        "normed": result("normed", [0, 0, 0, 0], [1, 1, 0, 1]),
        "plain": result("plain", [1, 0, 1, 0] * 5),
        "open": result("open", [0, 1, 1, 0] * 5, choices=False),
        "other": TaskResult("other", {}, {}, 4, {"perplexity": np.ones(4)}),
    }
    scorer._results[lowered] = {
        "normed": result("normed", [1, 1, 1, 1], [1, 0, 1, 1]),
        "plain": result("plain", [1, 0, 1, 1] * 5),
        "open": result("open", [0, 0, 0, 0] * 5, choices=False),
        "other": TaskResult("other", {}, {}, 4, {"perplexity": np.ones(4)}),
    }
    answers = scorer.right_answers(lowered)
    assert {name: list(right[:4]) for name, right in answers.items()} == {
        "normed": [1, 0, 1, 1], "plain": [1, 0, 1, 1], "open": [0, 0, 0, 0],
    }  # fmt: skip
    # One answer became wrong and one right of four, and five of twenty became right.
    assert scorer.flipped_answers_share(lowered) == 7 / 24
    assert scorer.flipped_answers_share(plan) == 0.0
    # 0.75 of four and 0.5 of twenty right answers are not three standard errors above chance.
    assert scorer.above_chance == ("open",)
    assert "not above chance in normed, plain" in caplog.text
    for results in scorer._results.values():
        del results["normed"], results["plain"]
    assert scorer.flipped_answers_share(lowered) is None
