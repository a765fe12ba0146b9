import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from rap_env.errors import InvalidRequestError, UnknownNameError
from rap_env.plan import Plan
from rap_env.reward import PerplexityReward, StepOutcome, make_reward
from rap_env.scoring.scorer import PlanScorer
from tests.tiny import VOCAB_SIZE, tiny_llm

PATH = [Plan.removing(*blocks) for blocks in ((), (1,), (1, 4), (1, 4), (0, 1, 4))]  # one invalid
BASELINE = Plan.removing(2, 3)


@pytest.fixture(scope="module")
def scorer() -> PlanScorer:
    torch.set_num_threads(1)
    tokens = torch.randint(3, VOCAB_SIZE, (2, 8), generator=torch.Generator().manual_seed(0))
    return PlanScorer(tiny_llm(layers=3), tokens)


class KeptShare:
    """A fake accuracy: the share of the six blocks that is kept."""

    def mean_accuracy(self, mask: Plan) -> float:
        return 1 - len(mask.removed) / 6

    def mean_choice_nll(self, mask: Plan) -> float:
        return 0.1 + len(mask.removed) / 3


def no_tasks() -> KeptShare:
    raise AssertionError("no task is needed for this reward")


def play(reward, scorer, path=PATH) -> list[dict[str, float]]:
    """What each step of an episode pays, with masks measured only where the reward asks for it.

    The mask of the baseline, if the reward is relative to one, is `BASELINE`.
    """
    compared = None
    if reward.relative_to is not None:
        compared = scorer.nll(BASELINE) - scorer.native_nll
    paid = []
    for number, (before, after) in enumerate(itertools.pairwise(path), start=2):
        ends = number == len(path)
        if ends or reward.pays_every_step:
            losses = [scorer.nll(mask) - scorer.native_nll for mask in (before, after)]
            known = losses[0] if reward.pays_every_step else None
            outcome = StepOutcome(after, losses[1], known, ends, compared if ends else None)
            paid.append(reward.step(outcome))
        else:
            paid.append(reward.zeros())
    return paid


@pytest.mark.parametrize("scale", ["nats", "log"])
@pytest.mark.parametrize("relative_to", [None, "gsi"])
@pytest.mark.parametrize("cap", [None, 0.05])
def test_steps_add_up_on_every_scale_and_relative_to_a_baseline(scorer, scale, relative_to, cap):
    settings = {"scale": scale, "relative_to": relative_to, "loss_cap": cap}
    returns = [
        sum(r["perplexity"] for r in play(make_reward({**spec, **settings}, no_tasks), scorer))
        for spec in (_dense(), {"name": "perplexity"})
    ]
    assert returns[0] == pytest.approx(returns[1], abs=1e-12)


@pytest.mark.parametrize(
    ("settings", "loss", "expected"),
    [
        ({}, 0.0, 0.0),
        ({}, 0.2, -math.log(5)),  # (0.2 + 0.05) / 0.05
        ({}, 2.4, -math.log(49)),
        ({"log_offset": 0.1}, 0.2, -math.log(3)),
        ({"loss_cap": 0.2}, 7.0, -math.log(5)),
        ({}, -0.01, 0.2),
        ({}, -3.0, 60.0),  # far below minus the offset, where no logarithm is
    ],
)
def test_the_log_scale_by_hand(settings, loss, expected):
    term = PerplexityReward(scale="log", **settings)
    assert term.step(StepOutcome(PATH[1], loss, None, ends=True)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("settings", "loss", "baseline_loss", "expected"),
    [
        ({}, 0.2, 0.5, 0.3),
        ({}, 0.5, 0.2, -0.3),
        ({"loss_cap": 0.4}, 0.3, 9.0, 0.1),
        ({"scale": "log"}, 0.2, 0.45, math.log(2)),  # (0.45 + 0.05) / (0.2 + 0.05)
        ({"scale": "log", "log_offset": 1.0}, 3.0, 1.0, -math.log(2)),
        ({"scale": "log"}, 1.7, 1.7, 0.0),
        ({"timing": "dense"}, 0.2, 0.5, 0.5 + 0.1 - 0.2),
    ],
)
def test_an_advantage_over_a_baseline_by_hand(settings, loss, baseline_loss, expected):
    term = PerplexityReward(relative_to="gsi", **settings)
    outcome = StepOutcome(PATH[1], loss, 0.1, ends=True, baseline_delta_nll=baseline_loss)
    assert term.step(outcome) == pytest.approx(expected)


def test_a_step_on_the_way_is_not_compared():
    on_the_way = StepOutcome(PATH[1], 0.3, 0.1, ends=False)
    assert PerplexityReward("dense", relative_to="gsi").step(on_the_way) == pytest.approx(-0.2)
    assert PerplexityReward(relative_to="gsi").step(on_the_way) == 0.0


def test_a_baseline_is_requested_only_if_a_term_uses_it():
    compared = {"name": "combined", "relative_to": "gsi"}
    assert make_reward(compared, KeptShare).relative_to == "gsi"
    only_accuracy = {**compared, "weights": {"perplexity": 0, "accuracy": 1}}
    assert make_reward(only_accuracy, KeptShare).relative_to is None
    assert make_reward("perplexity", no_tasks).relative_to is None
    assert make_reward("accuracy", KeptShare).relative_to is None


def test_the_dense_reward_pays_the_delta_nll_of_each_removal(scorer):
    paid = [r["perplexity"] for r in play(make_reward(_dense(), no_tasks), scorer)]
    nll = [scorer.nll(mask) for mask in PATH]
    assert paid == pytest.approx([a - b for a, b in itertools.pairwise(nll)])
    assert paid[2] == 0.0  # the action that changed nothing


def test_accuracy_is_paid_at_the_end_against_the_dense_model(scorer):
    reward = make_reward("accuracy", KeptShare)
    assert [r["accuracy"] for r in play(reward, scorer)] == pytest.approx([0, 0, 0, -3 / 6])
    assert not reward.pays_every_step


def test_combined_weights_its_terms_by_name(scorer):
    spec = {"name": "combined", "weights": {"perplexity": 2.0, "accuracy": 10}, "timing": "dense"}
    reward = make_reward(spec, KeptShare)
    alone = make_reward(_dense(), no_tasks)
    for both, single in zip(play(reward, scorer), play(alone, scorer), strict=True):
        assert both["perplexity"] == pytest.approx(2 * single["perplexity"])
    assert play(reward, scorer)[-1]["accuracy"] == pytest.approx(-5.0)
    assert reward.pays_every_step


def test_a_weight_of_zero_leaves_a_term_out(scorer):
    spec = {"name": "combined", "weights": {"perplexity": 1, "accuracy": 0}}
    assert set(play(make_reward(spec, no_tasks), scorer)[-1]) == {"perplexity"}


def test_recall_pays_the_rise_in_nats_at_the_end(scorer):
    spec = {"name": "combined", "weights": {"perplexity": 1, "recall": 0.5}}
    *before, last = play(make_reward(spec, KeptShare), scorer)
    assert [terms["recall"] for terms in before] == [0.0] * len(before)
    assert last["recall"] == pytest.approx(-0.5 * len(PATH[-1].removed) / 3)
    alone = make_reward("recall", KeptShare)
    assert alone.step(StepOutcome(Plan(), 0.0, None, ends=True)) == {"recall": 0.0}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("perplexty", "Unknown reward 'perplexty'; .* Did you mean 'perplexity'"),
        ({"name": "perplexity", "time": 1}, "setting of the reward 'perplexity': 'time'; .*timing"),
        ({"name": "accuracy", "timing": "dense"}, "setting of the reward 'accuracy': 'timing'"),
        ({"name": "perplexity", "scale": "ln"}, "scale of the reward 'ln'; .*'log', 'nats'"),
        ({"name": "combined", "relative_to": "gis"}, "baseline of the reward 'gis'; .* 'gsi'"),
        ({"name": "combined", "weights": {"speed": 1}}, "reward term 'speed'; .*'accuracy'"),
        ({"name": "perplexity", "loss_cap": 0}, "loss_cap must be above 0.* not 0"),
        ({"name": "combined", "weights": {"accuracy": -1}}, "'accuracy' must be at least 0"),
        ({"name": "combined", "weights": {"accuracy": 0}}, "needs a weight above 0"),
    ],
)
def test_wrong_specifications_are_rejected(spec, message):
    with pytest.raises((InvalidRequestError, UnknownNameError), match=message):
        make_reward(spec, KeptShare)


def _dense() -> dict[str, str]:
    return {"name": "perplexity", "timing": "dense"}


@pytest.mark.parametrize(
    ("spec", "best", "failure"),
    [
        ("perplexity", -4.0, -8.0),
        ({"name": "perplexity", "loss_cap": 1.5}, -1.5, -3.0),
        ({"name": "perplexity", "scale": "log"}, -math.log(81), -math.log(161)),
        ("recall", -4.0, -8.0),
        ("accuracy", -1.0, -2.0),
    ],
)
def test_an_episode_that_fails_pays_less_than_the_worst_plan_that_fits(spec, best, failure):
    """Values by hand: the ceiling is 4 nats, twice that for a failure."""
    hopeless = SimpleNamespace(
        mean_accuracy=lambda plan: float(not plan),
        mean_choice_nll=lambda plan: 99.0 if plan else 0.0,
    )
    reward = make_reward(spec, lambda: hopeless, ceiling=4.0)
    fits = StepOutcome(PATH[1], 99.0, None, ends=True)
    fails = StepOutcome(PATH[1], 0.1, None, ends=True, fails=True)
    assert list(reward.step(fits).values()) == pytest.approx([best])
    assert list(reward.step(fails).values()) == pytest.approx([failure])
    assert list(reward.step(fails._replace(mask=Plan())).values()) == pytest.approx([failure])
