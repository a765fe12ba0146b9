"""Rewards that are relative to what a baseline reaches at the same request."""

import pytest

from rap_env.errors import InvalidRequestError, UnknownNameError
from rap_env.importance.plan_table import PlanTable
from rap_env.plan import Plan
from rap_env.policies.loading import make_method
from tests.envs.playing import (
    COUNT,
    NUM_ENVS,
    make,
    make_vector,
    play,
    request_at,
)
from tests.envs.test_vector import CountsCalls
from tests.envs.tiny_contexts import make_context

FRONTIER = [Plan.removing(*range(count)) for count in range(1, COUNT + 1)]


def relative(name: str, **settings) -> dict:
    return {"name": "perplexity", "relative_to": name, **settings}


def loss_of(context, mask: Plan) -> float:
    return context.scorer.nll(mask) - context.scorer.native_nll


def frontier_of(context, masks) -> PlanTable:
    """A frontier with these masks."""
    scores = zip(masks, context.scorer.nll_many(masks), strict=True)
    return PlanTable(
        num_layers=COUNT // 2,
        dense_nll=context.scorer.native_nll,
        scores=dict(scores),
        evaluations_run=len(masks),
        seconds=0.0,
        settings={},
        provenance={},
    )


@pytest.fixture(scope="module")
def ordered():
    """A context with a GSI order and a frontier."""
    wrapped = make_context(importance="gsi")
    wrapped.frontier = frontier_of(wrapped, FRONTIER)
    return wrapped


@pytest.mark.parametrize("name", ["gsi", "one_shot", "frontier"])
@pytest.mark.parametrize("seed", range(4))
def test_the_return_is_the_advantage_over_the_baseline(ordered, name, seed):
    env = make(ordered, reward=relative(name), workload="azure-conv")
    *_, info = play(env, seed, masked=True)[-1]
    expected = loss_of(ordered, make_method(name, ordered).choose(env.request))
    assert info["baseline_loss"] == pytest.approx(expected, abs=1e-12)
    assert info["reward_terms"]["perplexity"] == pytest.approx(expected - info["loss"])


def test_baseline_masks_and_final_masks_are_scored_together(ordered):
    context = CountsCalls(ordered)
    context.gsi = ordered.gsi
    vector = make_vector(context, reward=relative("gsi"), autoreset_mode="SameStep")
    vector.reset(seed=0)
    ended = []
    for step in range(20):
        _, _, terminated, truncated, _ = vector.step([step % COUNT] * NUM_ENVS)
        ended.append(int((terminated | truncated).sum()))
    assert context.asked == [2 * count for count in ended if count]


def test_a_request_below_the_frontier_is_rejected_and_changes_nothing():
    context = make_context()
    context.frontier = frontier_of(context, [Plan.removing(1)])
    env = make(context, reward=relative("frontier"))
    env.reset(seed=0, options={"request": request_at(context, 1e-6)})  # clipped: all must go
    for action in range(COUNT - 1):
        env.step(action)
    with pytest.raises(InvalidRequestError, match="No plan of the frontier fits Request"):
        env.step(COUNT - 1)
    assert len(env.plan.removed) == COUNT - 1


def test_an_unavailable_baseline_is_rejected_at_construction(ordered):
    blind = make_context(importance="none")
    for maker in (make, make_vector):
        with pytest.raises(InvalidRequestError, match="importance='none' leaves it out"):
            maker(blind, reward=relative("gsi"))
        with pytest.raises(UnknownNameError, match="baseline of the reward 'greedy'"):
            maker(ordered, reward=relative("greedy"))
    only_accuracy = {"name": "combined", "weights": {"perplexity": 1, "accuracy": 0}}
    make(blind, reward=only_accuracy)  # asks for no order
    make(blind, reward=relative("one_shot"))  # needs no GSI order
