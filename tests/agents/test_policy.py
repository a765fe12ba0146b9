from __future__ import annotations

import numpy as np
import pytest
import torch

from agents.algorithms import ALGORITHMS, AgentConfig, make_model
from agents.policy import TrainedPolicy
from agents.training import make_vector_env, train
from rap_env.envs.observation import ObservationBuilder
from rap_env.errors import ArtifactError, InfeasibleBudgetError, InvalidRequestError
from rap_env.workload import Request
from tests.agents.synthetic import SyntheticBench, make_envs, request_at


def untrained(name, bench, policy="blockwise"):
    """A policy with random weights, whose favourite is as likely a removed block as a kept one."""
    config = AgentConfig(name, policy, n_envs=1)
    model = make_model(config, make_vector_env(config, make_envs(bench)))
    for parameter in model.policy.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return TrainedPolicy(model.policy, ObservationBuilder(bench.memory, bench.features))


@pytest.mark.parametrize("policy", ["blockwise", "mlp"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_budget_is_met_without_a_score(bench, name, policy):
    trained = untrained(name, bench, policy)
    before = bench.scorer.evaluations
    for fraction in np.linspace(0.35, 0.95, 7):
        request = request_at(bench, 2, 300, fraction)
        choice = trained.select(request)
        assert bench.memory.peak_bytes(choice.mask, request) <= request.budget_bytes
        assert choice.evaluations == choice.block_forwards == 0
        assert choice.fits
        assert trained.select(request).mask == choice.mask
    assert bench.scorer.evaluations == before


def test_stops_at_the_first_mask_that_fits(bench):
    trained = untrained("ppo", bench)
    assert not trained.select(request_at(bench, 1, 10, 1.0)).mask
    assert len(trained.select(request_at(bench, 1, 10, 0.999)).mask) == 1


def test_impossible_requests_are_refused(bench):
    trained = untrained("dqn", bench)
    with pytest.raises(InfeasibleBudgetError, match="with every block removed"):
        trained.select(Request(1, 10, 100))
    with pytest.raises(InvalidRequestError, match="from 1 to 4096 tokens"):
        trained.select(Request(1, 5000, 10**9))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One short training for each policy on a model of 4 layers."""
    folders = {}
    bench = SyntheticBench(np.linspace(0.1, 0.8, 8))
    for policy in ("blockwise", "mlp"):
        folders[policy] = tmp_path_factory.mktemp(policy)
        config = AgentConfig("ppo", policy, 64, 2, hyperparameters={"n_steps": 32})
        train(config, make_envs(bench), folders[policy], progress=False)
    return folders


def test_blockwise_policy_serves_a_model_with_more_layers(runs, bench):
    choice = TrainedPolicy.load(runs["blockwise"], bench).select(request_at(bench, 1, 10, 0.7))
    assert choice.fits
    assert len(bench.memory.facts.blocks) == 12


def test_mlp_policy_of_another_model_is_refused(runs, bench):
    with pytest.raises(ArtifactError, match="trained on a model of another shape.*train one"):
        TrainedPolicy.load(runs["mlp"], bench)


def test_without_a_checkpoint_it_says_so(tmp_path, bench):
    with pytest.raises(ArtifactError, match="holds no checkpoint; train an agent there first"):
        TrainedPolicy.load(tmp_path, bench)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_bytes_of_stubs_count(repaired_bench, name):
    memory = repaired_bench.memory
    trained = untrained(name, repaired_bench)
    for fraction in (0.95, 0.85, 0.75):
        request = request_at(repaired_bench, 8, 64, fraction)
        choice = trained.select(request)
        parts = memory.breakdown(choice.mask, request)
        assert parts.stubs == sum(memory.facts.stub_bytes[index] for index in choice.mask) > 0
        assert choice.fits
        assert parts.peak <= request.budget_bytes
