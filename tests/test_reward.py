from __future__ import annotations

import itertools
import math

import pytest
import torch

from rap_env.blocks import BlockMask
from rap_env.errors import InvalidRequestError, UnknownNameError
from rap_env.reward import (
    REWARDS,
    AccuracyReward,
    Outcome,
    PerplexityReward,
    RewardTerm,
    make_reward,
)
from rap_env.scoring.scorer import MaskScorer
from tests.tiny import VOCAB_SIZE, tiny_llm

PATH = [BlockMask.of(*blocks) for blocks in ((), (1,), (1, 4), (1, 4), (0, 1, 4))]  # one invalid


@pytest.fixture(scope="module")
def scorer() -> MaskScorer:
    torch.set_num_threads(1)
    tokens = torch.randint(3, VOCAB_SIZE, (2, 8), generator=torch.Generator().manual_seed(0))
    return MaskScorer(tiny_llm(layers=3), tokens)


class KeptShare:
    """A measure of accuracy that is known by heart: the share of the six blocks that is kept."""

    def mean_accuracy(self, mask: BlockMask) -> float:
        return 1 - len(mask) / 6


def no_tasks() -> KeptShare:
    raise AssertionError("no task is needed for this reward")


def play(reward, scorer, path=PATH) -> list[dict[str, float]]:
    """What each step of an episode pays, with masks measured only where the reward asks for it."""
    paid = []
    for number, (before, after) in enumerate(itertools.pairwise(path), start=2):
        ends = number == len(path)
        if ends or reward.pays_every_step:
            losses = [scorer.nll(mask) - scorer.dense_nll for mask in (before, after)]
            known = losses[0] if reward.pays_every_step else None
            paid.append(reward.step(Outcome(after, losses[1], known, ends)))
        else:
            paid.append(reward.nothing())
    return paid


@pytest.mark.parametrize("cap", [None, 0.05])
def test_dense_and_terminal_timing_have_equal_returns(scorer, cap):
    returns = {}
    for timing in ("dense", "terminal"):
        spec = {"name": "perplexity", "timing": timing, "loss_cap": cap}
        returns[timing] = sum(r["perplexity"] for r in play(make_reward(spec, no_tasks), scorer))
    loss = scorer.nll(PATH[-1]) - scorer.dense_nll
    assert loss > 0.05  # so that the cap bites
    assert returns["dense"] == pytest.approx(returns["terminal"], abs=1e-12)
    assert returns["terminal"] == pytest.approx(-loss if cap is None else -cap)


def test_the_dense_reward_pays_each_removal_what_it_adds(scorer):
    paid = [r["perplexity"] for r in play(make_reward(_dense(), no_tasks), scorer)]
    nll = [scorer.nll(mask) for mask in PATH]
    assert paid == pytest.approx([a - b for a, b in itertools.pairwise(nll)])
    assert paid[2] == 0.0  # the action that changed nothing


def test_a_dense_reward_without_the_loss_before_is_refused():
    with pytest.raises(ValueError, match="needs the loss of the mask before"):
        PerplexityReward("dense").step(Outcome(PATH[1], 1.0, None, ends=True))


def test_no_removal_is_the_baseline_of_every_term():
    nothing = Outcome(BlockMask(), 0.0, 0.0, ends=True)
    for term in (PerplexityReward(), PerplexityReward("dense"), AccuracyReward(KeptShare())):
        assert term.step(nothing) == 0.0


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


@pytest.mark.parametrize("kind", [PerplexityReward, AccuracyReward])
def test_every_term_states_what_it_is(kind: type[RewardTerm]):
    low, high = kind.range
    assert low < 0 < high
    assert kind.deterministic
    assert "dense" in kind.baseline
    assert kind.on_failure


@pytest.mark.parametrize("name", sorted(REWARDS))
def test_every_reward_works_by_name(scorer, name):
    terms = play(make_reward(name, KeptShare), scorer)[-1]
    assert all(math.isfinite(value) and value < 0 for value in terms.values())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("perplexty", "Unknown reward 'perplexty'; .* Did you mean 'perplexity'"),
        ({"name": "perplexity", "time": 1}, "setting of the reward 'perplexity': 'time'; .*timing"),
        ({"name": "accuracy", "timing": "dense"}, "setting of the reward 'accuracy': 'timing'"),
        ({"name": "perplexity", "timing": "late"}, "timing of the reward 'late'; .*'terminal'"),
        ({"name": "combined", "weights": {"speed": 1}}, "reward term 'speed'; .*'accuracy'"),
    ],
)
def test_unknown_names_list_the_known_ones(spec, message):
    with pytest.raises(UnknownNameError, match=message):
        make_reward(spec, KeptShare)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "perplexity", "loss_cap": 0}, "loss_cap must be above 0 .* not 0"),
        ({"name": "combined", "weights": {"accuracy": -1}}, "'accuracy' must be at least 0"),
        ({"name": "combined", "weights": {"accuracy": math.nan}}, "not nan"),
        ({"name": "combined", "weights": {"accuracy": 0}}, "needs a weight above 0"),
    ],
)
def test_impossible_settings_are_refused(spec, message):
    with pytest.raises(InvalidRequestError, match=message):
        make_reward(spec, KeptShare)


def _dense() -> dict[str, str]:
    return {"name": "perplexity", "timing": "dense"}
