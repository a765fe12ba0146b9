import numpy as np
import pytest
import torch

from agents import trained_policy as policies
from agents.algorithms import ALGORITHMS, AgentConfigError
from agents.trained_policy import TrainedPolicy
from rap_env.errors import ArtifactError, InfeasibleBudgetError, InvalidRequestError
from rap_env.ladder.ladder_bytes import mask_bytes
from rap_env.ladder.observation import ObservationEncoder
from rap_env.ladder.steps import LevelSteps
from rap_env.plan import Plan
from rap_env.policies.method import measure_choice
from rap_env.request import Request
from tests.agents.ladders import SPEC, LadderContext
from tests.agents.policies import encoder_for, lowers, untrained
from tests.agents.synthetic import request_at
from tests.policies.requests import fits


def trained_policy(name, context, spread=0.5, without=(), **options):
    """A policy with random weights, whose favourite is as likely a removed block as a kept one."""
    settings = {"without": list(without)} if without else {}
    model = untrained(name, context, spread, **settings)
    return TrainedPolicy(model.policy, encoder_for(context), **options)


@pytest.mark.parametrize("name", ["maskable_ppo", "masked_dqn"])
def test_it_lowers_the_item_with_the_highest_network_score(any_context, name):
    trained, builder = trained_policy(name, any_context), encoder_for(any_context)
    request, plan = request_at(any_context, 2, 500, 0.5), Plan()
    while not fits(any_context, plan, request):
        observation = builder.build(request, plan)
        given = {"action_masks": observation["action_mask"]} if name == "maskable_ppo" else {}
        action, _ = trained._policy.predict(observation, deterministic=True, **given)
        positions = builder.ladder.positions(plan)
        plan = builder.ladder.plan(LevelSteps.every(builder.ladder).after(positions, int(action)))
    assert trained.choose(request) == plan


@pytest.mark.parametrize("name", ALGORITHMS)
def test_best_of_takes_the_plan_with_the_lowest_score(any_context, monkeypatch, name):
    context = any_context
    monkeypatch.setattr(policies, "_Q_TEMPERATURE", 2.0)  # random Q values fall into two heaps
    judged = []

    def score(masks):
        judged.append(masks)
        return [float(context.scorer.loss(mask)) for mask in masks]

    trained = trained_policy(name, context, spread=0.1, best_of=16, score_plans=score)
    request = request_at(context, 2, 300, 0.6)
    (greedy,) = trained.sample(request, 1)
    assert not judged
    chosen = trained.choose(request)
    (masks,) = judged
    assert masks[0] == greedy
    assert 3 < len(masks) == len(set(masks)) <= 16
    assert all(fits(context, mask, request) for mask in masks)
    for mask in masks if not lowers(context) else ():  # no sample goes on once it fits
        assert any(
            not fits(context, Plan(mask.removed - {block}), request) for block in mask.removed
        )
    assert context.scorer.loss(chosen) == min(context.scorer.loss(mask) for mask in masks)
    assert trained.choose(request) == chosen
    assert trained.evaluations == 0


def test_samples_follow_the_probabilities_of_the_network(context):
    """The first removal alone, from 4,000 samples of a request that one block satisfies."""
    trained = trained_policy("ppo", context)
    request = request_at(context, 1, 10, 0.999)
    with torch.no_grad():
        for parameter in trained._policy.parameters():
            parameter.mul_(0.2)  # less sure of itself
    observation = ObservationEncoder(mask_bytes(context.memory), context.features).build(
        request, Plan()
    )
    tensors, _ = trained._policy.obs_to_tensor(observation)
    with torch.no_grad():
        expected = trained._policy.get_distribution(tensors).distribution.probs[0].numpy()
    masks = trained.sample(request, 4001)[1:]
    counts = np.bincount([next(iter(mask.removed)) for mask in masks], minlength=12)
    assert 0.1 < expected.max() < 0.9
    assert counts / 4000 == pytest.approx(expected, abs=0.035)  # 4 deviations


def test_real_scores_count_as_evaluations(context):
    trained = trained_policy("ppo", context, best_of=8, scorer=context.scorer)
    request = request_at(context, 2, 300, 0.6)
    before = context.scorer.evaluations
    choice = measure_choice(trained, request, context.scorer)
    assert choice.evaluations == context.scorer.evaluations - before > 3
    assert choice.decision_s < 50
    again = measure_choice(trained, request, context.scorer)  # stored scores cost as much
    assert again.evaluations == choice.evaluations
    assert context.scorer.evaluations - before == choice.evaluations
    assert again.decision_s > choice.evaluations * context.scorer.evaluation_s
    assert again.plan == choice.plan


def test_a_nan_score_never_wins(context):
    def score(masks):
        return [np.nan, *range(len(masks), 1, -1)]

    trained = trained_policy("ppo", context, best_of=8, score_plans=score)
    request = request_at(context, 2, 300, 0.6)
    last = list(dict.fromkeys(trained.sample(request, 8)))[-1]
    assert trained.choose(request) == last


@pytest.mark.parametrize(
    ("best_of", "text"), [(4, "needs a way to score plans"), (0, "at least 1")]
)
def test_best_of_needs_a_scorer(context, best_of, text):
    with pytest.raises(AgentConfigError, match=text):
        trained_policy("ppo", context, best_of=best_of)


def test_impossible_requests_are_rejected(any_context):
    trained = trained_policy("dqn", any_context)
    with pytest.raises(InfeasibleBudgetError, match=r"100 bytes.*(still needs|lowest ones need)"):
        trained.choose(Request(1, 10, 100))
    with pytest.raises(InvalidRequestError, match="from 1 to 4096 tokens"):
        trained.choose(Request(1, 5000, 10**9))


def test_a_blockwise_policy_serves_a_larger_model_and_others_are_rejected(runs):
    own, larger, folders = runs
    for context, kind in ((larger, "plain"), (own, "plain"), (own, "vectors")):
        policy, request = (
            TrainedPolicy.load(folders[kind], context),
            request_at(context, 8, 2000, 0.6),
        )
        assert fits(context, policy.choose(request), request)
    with pytest.raises(ArtifactError, match="another shape: .*block_vectors=0, which serves any"):
        TrainedPolicy.load(folders["vectors"], larger)


@pytest.mark.parametrize("runs", ["levels"], indirect=True)
def test_a_policy_is_loaded_with_its_ladder_and_serves_packed_weights(runs):
    own, _, folders = runs
    ladder = TrainedPolicy.load(folders["plain"], own)._encoder.ladder
    assert ladder.spec["together"] == SPEC["together"]
    assert set(ladder.cache_levels) == set(encoder_for(own).ladder.cache_levels)
    packed = LadderContext(packed=True)  # whose weights have fewer levels
    request = request_at(packed, 8, 2000, 0.5)
    assert fits(packed, TrainedPolicy.load(folders["plain"], packed).choose(request), request)
