"""The exported policy chooses what the trained one does, block for block."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from agents.algorithms import ALGORITHMS, AgentConfig, make_model
from agents.export import export_policy, network_weights
from agents.trained_policy import TrainedPolicy
from agents.training import make_vector_env, train
from rap_env.errors import ArtifactError
from rap_env.ladder.observation import ObservationBuilder
from rap_env.policies.block_network import BlockNetwork, NetworkWeights
from rap_env.policies.loading import load_policy
from rap_env.policies.packaged_networks import NetworkPolicy
from rap_env.policies.policy_file import PolicyFile
from tests.agents.synthetic import SyntheticContext, make_envs, request_at

SHAPES = [(1, 10), (4, 500), (16, 2000)]
FRACTIONS = np.linspace(0.3, 0.99, 12)
ABLATIONS = [
    (),
    ("gsi", "one_shot", "request"),
    ("kind", "depth"),
    *(pytest.param((name,), marks=pytest.mark.slow) for name in ("gsi", "one_shot", "request")),
]


def wide_bench(layers=15, seed=0):
    costs = np.random.default_rng(seed).lognormal(-3, 0.8, 2 * layers)
    return SyntheticContext(costs, interaction=2.0, cap=12.0)


def untrained(name, context, policy="blockwise", spread=None, **settings):
    """A policy as it is before training, or with random weights of some spread."""
    torch.manual_seed(0)
    config = AgentConfig(name, policy, n_envs=1, policy_settings=settings)
    model = make_model(config, make_vector_env(config, make_envs(context)))
    if spread:
        for parameter in model.policy.parameters():
            torch.nn.init.normal_(parameter, std=spread)
    return model.policy


def assert_same_choices(context, policy, network):
    """The same masks on a grid of requests."""
    builder = ObservationBuilder(context.memory, context.features)
    trained, found = TrainedPolicy(policy, builder), set()
    for shape in SHAPES:
        for fraction in FRACTIONS:
            request = request_at(context, *shape, fraction)
            mask = trained.choose(request)
            assert frozenset(network.removals(request)) == mask.removed
            found.add(mask)
    return found


@pytest.mark.parametrize(
    ("vectors", "spread"),
    [pytest.param(0, None, marks=pytest.mark.slow), (16, 0.3)],
    ids=["first", "random"],
)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_numpy_and_torch_choose_the_same_masks(name, vectors, spread):
    context = wide_bench()
    policy = untrained(name, context, spread=spread, hidden=24, block_vectors=vectors)
    builder = ObservationBuilder(context.memory, context.features)
    masks = assert_same_choices(
        context, policy, BlockNetwork(network_weights(policy, NetworkWeights), builder)
    )
    assert len(masks) > 5


@pytest.mark.parametrize("without", ABLATIONS, ids=lambda names: "-".join(names) or "nothing")
@pytest.mark.parametrize("name", ["maskable_ppo", "dqn"])
def test_numpy_and_torch_agree_under_every_ablation(name, without):
    context = wide_bench()
    policy = untrained(name, context, spread=0.3, block_vectors=4, without=list(without))
    builder = ObservationBuilder(context.memory, context.features)
    weights = network_weights(policy, NetworkWeights, without)
    assert weights.without == without
    assert_same_choices(context, policy, BlockNetwork(weights, builder))


def test_numpy_and_torch_agree_with_stubs(repaired_context):
    policy = untrained("maskable_ppo", repaired_context, spread=0.3)
    builder = ObservationBuilder(repaired_context.memory, repaired_context.features)
    network, trained = (
        BlockNetwork(network_weights(policy, NetworkWeights), builder),
        TrainedPolicy(policy, builder),
    )
    for fraction in (0.95, 0.85, 0.75):
        request = request_at(repaired_context, 8, 64, fraction)
        assert frozenset(network.removals(request)) == trained.choose(request).removed


@pytest.mark.parametrize("name", ["maskable_ppo", "dqn"])
def test_an_mlp_scores_no_single_blocks(name, context):
    with pytest.raises(ArtifactError, match="only block-wise policies can be exported"):
        network_weights(untrained(name, context, policy="mlp"), NetworkWeights)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Short trainings on a model of 6 layers."""
    kinds = {
        "plain": ("maskable_ppo", "blockwise", {"without": ["one_shot"]}),
        "vectors": ("ppo", "blockwise", {"block_vectors": 4}),
        "mlp": ("ppo", "mlp", {}),
    }
    context, folders = wide_bench(6), {}
    for kind, (name, policy, settings) in kinds.items():
        folders[kind] = tmp_path_factory.mktemp(kind)
        config = AgentConfig(
            name, policy, 64, 2, hyperparameters={"n_steps": 32}, policy_settings=settings
        )
        train(config, make_envs(context), folders[kind], progress=False)
    return context, folders


@pytest.mark.parametrize("kind", ["plain", "vectors"])
def test_an_exported_run_chooses_the_same_masks(runs, kind, tmp_path):
    context, folders = runs
    export_policy(folders[kind], context).save(tmp_path / "policy.safetensors")
    exported, trained = (
        load_policy(tmp_path / "policy.safetensors", context.memory),
        TrainedPolicy.load(folders[kind], context),
    )
    assert isinstance(exported, NetworkPolicy)
    assert exported.order == context.gsi.full_order
    for shape in SHAPES:
        for fraction in FRACTIONS:
            request = request_at(context, *shape, fraction)
            assert exported.choose(request) == trained.choose(request)


def test_the_file_records_its_provenance(runs, tmp_path):
    context, folders = runs
    export_policy(folders["plain"], context).save(tmp_path / "policy.safetensors")
    file = PolicyFile.load(tmp_path / "policy.safetensors")
    assert file.provenance["run"] == folders["plain"].name
    assert (file.provenance["agent"], file.provenance["seed"]) == ("maskable_ppo", 0)
    assert file.provenance["steps"] == 64
    assert file.model.num_blocks == 12
    assert file.weights.without == ("one_shot",)


def test_a_policy_is_exported_for_another_model_where_it_transfers(runs):
    _, folders = runs
    larger = wide_bench(9, seed=1)
    file = export_policy(folders["plain"], larger)
    assert file.model.num_blocks == 18
    exported = NetworkPolicy(larger.memory, file)
    trained = TrainedPolicy.load(folders["plain"], larger)
    request = request_at(larger, 4, 500, 0.6)
    assert exported.choose(request) == trained.choose(request)
    with pytest.raises(ArtifactError, match="vector for each of 12 blocks, but this model has 18"):
        export_policy(folders["vectors"], larger)


def test_an_unexportable_policy_raises_an_error_with_the_reason(runs, tmp_path):
    context, folders = runs
    with pytest.raises(ArtifactError, match="is 'mlp', but only block-wise policies"):
        export_policy(folders["mlp"], context)
    with pytest.raises(ArtifactError, match="holds no checkpoint; train an agent there first"):
        export_policy(tmp_path, context)
