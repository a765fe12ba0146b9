from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from agents import trained_policy as policies
from agents.algorithms import ALGORITHMS, AgentConfig, make_model
from agents.settings import AgentConfigError
from agents.trained_policy import TrainedPolicy
from agents.training import make_vector_env, train
from rap_env.errors import ArtifactError, InfeasibleBudgetError, InvalidRequestError
from rap_env.ladder.observation import ObservationBuilder
from rap_env.plan import Plan
from rap_env.policies.method import measure_choice
from rap_env.request import Request
from tests.agents.synthetic import SyntheticContext, make_envs, request_at
from tests.policies.requests import fits


@pytest.fixture(autouse=True)
def _same_weights_each_time():
    torch.manual_seed(0)


def untrained(name, context, policy="blockwise", without=(), spread=0.5, **options):
    """A policy with random weights, whose favourite is as likely a removed block as a kept one."""
    settings = {"without": list(without)} if without else {}
    config = AgentConfig(name, policy, n_envs=1, policy_settings=settings)
    model = make_model(config, make_vector_env(config, make_envs(context)))
    for parameter in model.policy.parameters():
        torch.nn.init.normal_(parameter, std=spread)
    builder = ObservationBuilder(context.memory, context.features)
    return TrainedPolicy(model.policy, builder, **options)


@pytest.mark.parametrize("policy", ["blockwise", "mlp"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_budget_is_met_without_a_score(context, name, policy):
    trained = untrained(name, context, policy)
    before = context.scorer.evaluations
    for fraction in np.linspace(0.35, 0.95, 7):
        request = request_at(context, 2, 300, fraction)
        mask = trained.choose(request)
        assert context.memory.peak_bytes(mask, request) <= request.budget_bytes
        assert trained.choose(request) == mask
    assert trained.evaluations == 0
    assert context.scorer.evaluations == before


@pytest.mark.parametrize("name", ["maskable_ppo", "masked_dqn"])
def test_it_removes_the_block_with_the_highest_network_score(context, name):
    trained = untrained(name, context)
    request, mask = request_at(context, 2, 300, 0.5), Plan()
    builder = ObservationBuilder(context.memory, context.features)
    network = trained._policy
    while not fits(context, mask, request):
        observation = builder.build(request, mask)
        given = {"action_masks": observation["action_mask"]} if name == "maskable_ppo" else {}
        action, _ = network.predict(observation, deterministic=True, **given)
        mask = mask.without(int(action))
    assert trained.choose(request) == mask


def size(mask):
    return len(mask.removed)


@pytest.mark.parametrize("name", ["ppo", "dqn"])
def test_without_the_request_it_is_one_static_order(context, name):
    torch.manual_seed(0)
    blind, seeing = untrained(name, context, without=["request"]), untrained(name, context)
    requests = [
        request_at(context, *shape, f)
        for shape in [(1, 10), (16, 2000), (4, 500)]
        for f in (0.4, 0.55, 0.7, 0.85)
    ]
    masks = sorted((blind.choose(request) for request in requests), key=size)
    assert len({len(mask.removed) for mask in masks}) > 4
    assert all(one.removed <= other.removed for one, other in itertools.pairwise(masks))
    masks = sorted((seeing.choose(request) for request in requests), key=size)
    assert not all(one.removed <= other.removed for one, other in itertools.pairwise(masks))


@pytest.mark.parametrize("policy", ["blockwise", "mlp"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_best_of_takes_the_mask_with_the_lowest_score(context, monkeypatch, name, policy):
    monkeypatch.setattr(policies, "_Q_TEMPERATURE", 2.0)  # random Q values fall into two heaps
    judged = []

    def score(masks):
        judged.append(masks)
        return [float(context.scorer.loss(mask)) for mask in masks]

    trained = untrained(name, context, policy, spread=0.1, best_of=16, score_masks=score)
    request = request_at(context, 2, 300, 0.6)
    (greedy,) = trained.sample(request, 1)
    assert not judged
    chosen = trained.choose(request)
    (masks,) = judged
    assert masks[0] == greedy
    assert 3 < len(masks) == len(set(masks)) <= 16
    assert all(fits(context, mask, request) for mask in masks)
    for mask in masks:  # no sample goes on once it fits
        assert any(
            not fits(context, Plan(mask.removed - {block}), request) for block in mask.removed
        )
    assert context.scorer.loss(chosen) == min(context.scorer.loss(mask) for mask in masks)
    assert trained.choose(request) == chosen
    assert trained.evaluations == 0


def test_samples_follow_the_probabilities_of_the_network(context):
    """The first removal alone, from 4,000 samples of a request that one block satisfies."""
    trained = untrained("ppo", context)
    request = request_at(context, 1, 10, 0.999)
    with torch.no_grad():
        for parameter in trained._policy.parameters():
            parameter.mul_(0.2)  # less sure of itself
    observation = ObservationBuilder(context.memory, context.features).build(request, Plan())
    tensors, _ = trained._policy.obs_to_tensor(observation)
    with torch.no_grad():
        expected = trained._policy.get_distribution(tensors).distribution.probs[0].numpy()
    masks = trained.sample(request, 4001)[1:]
    counts = np.bincount([next(iter(mask.removed)) for mask in masks], minlength=12)
    assert 0.1 < expected.max() < 0.9
    assert counts / 4000 == pytest.approx(expected, abs=0.035)  # 4 deviations


def test_real_scores_count_as_evaluations(context):
    trained = untrained("ppo", context, best_of=8, scorer=context.scorer)
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

    trained = untrained("ppo", context, best_of=8, score_masks=score)
    request = request_at(context, 2, 300, 0.6)
    last = list(dict.fromkeys(trained.sample(request, 8)))[-1]
    assert trained.choose(request) == last


@pytest.mark.parametrize(
    ("best_of", "text"), [(4, "needs a way to score masks"), (0, "at least 1")]
)
def test_best_of_needs_a_scorer(context, best_of, text):
    with pytest.raises(AgentConfigError, match=text):
        untrained("ppo", context, best_of=best_of)


def test_stops_at_the_first_mask_that_fits(context):
    trained = untrained("ppo", context)
    assert not trained.choose(request_at(context, 1, 10, 1.0))
    assert size(trained.choose(request_at(context, 1, 10, 0.999))) == 1


def test_impossible_requests_are_rejected(context):
    trained = untrained("dqn", context)
    with pytest.raises(InfeasibleBudgetError, match="the lowest ones need"):
        trained.choose(Request(1, 10, 100))
    with pytest.raises(InvalidRequestError, match="from 1 to 4096 tokens"):
        trained.choose(Request(1, 5000, 10**9))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One short training for each policy on a model of 4 layers."""
    folders = {}
    context = SyntheticContext(np.linspace(0.1, 0.8, 8))
    kinds = {"blockwise": {}, "mlp": {}, "vectors": {"block_vectors": 4}}
    for kind, settings in kinds.items():
        folders[kind] = tmp_path_factory.mktemp(kind)
        policy = "mlp" if kind == "mlp" else "blockwise"
        config = AgentConfig(
            "ppo", policy, 64, 2, hyperparameters={"n_steps": 32}, policy_settings=settings
        )
        train(config, make_envs(context), folders[kind], progress=False)
    return folders


def test_blockwise_policy_serves_a_model_with_more_layers(runs, context):
    request = request_at(context, 1, 10, 0.7)
    mask = TrainedPolicy.load(runs["blockwise"], context).choose(request)
    assert fits(context, mask, request)
    assert len(context.memory.facts.blocks) == 12


def test_mlp_policy_of_another_model_is_rejected(runs, context):
    with pytest.raises(ArtifactError, match="trained on a model of another shape.*train a policy"):
        TrainedPolicy.load(runs["mlp"], context)


def test_a_policy_with_block_vectors_needs_its_own_number_of_blocks(runs, context):
    with pytest.raises(ArtifactError, match="vector for each of 8 blocks, but this model has 12"):
        TrainedPolicy.load(runs["vectors"], context)
    own = SyntheticContext(np.linspace(0.2, 0.9, 8))
    request = request_at(own, 1, 10, 0.7)
    assert fits(own, TrainedPolicy.load(runs["vectors"], own).choose(request), request)


def test_options_of_a_choice_can_be_loaded_with(runs, context):
    options = {"best_of": 8, "scorer": context.scorer}
    trained = TrainedPolicy.load(runs["blockwise"], context, **options)
    trained.choose(request_at(context, 1, 10, 0.7))
    assert 1 < trained.evaluations <= 8


def test_a_missing_checkpoint_raises_an_error(tmp_path, context):
    with pytest.raises(ArtifactError, match="holds no checkpoint; train an agent there first"):
        TrainedPolicy.load(tmp_path, context)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_bytes_of_stubs_count(repaired_context, name):
    memory = repaired_context.memory
    trained = untrained(name, repaired_context)
    for fraction in (0.95, 0.85, 0.75):
        request = request_at(repaired_context, 8, 64, fraction)
        mask = trained.choose(request)
        parts = memory.breakdown(mask, request)
        assert parts.stubs == sum(memory.facts.stub_bytes[index] for index in mask.removed) > 0
        assert parts.peak <= request.budget_bytes
