"""The exported policy chooses what the trained one does, action for action."""

import numpy as np
import pytest

from agents.algorithms import ALGORITHMS
from agents.export import export_policy, network_weights
from agents.trained_policy import TrainedPolicy
from rap_env.errors import ArtifactError
from rap_env.policies.loading import load_policy
from rap_env.policies.network import PolicyNetwork
from rap_env.policies.network_policy import NetworkPolicy, PolicyFile
from tests.agents.ladders import LadderContext, encoder_of, feasible, make_envs, requests_of
from tests.agents.policies import encoder_for, lowers, requests_for, untrained
from tests.agents.synthetic import block_context, request_at

SPECS = [
    {"levels": "all", "together": ["int8", "int4"]},
    {"levels": "all", "together": ["int8", "int4", "int4-window512"]},
    {"levels": "all", "together": []},
    {"levels": "masks", "together": []},
    {"levels": {"caches": ["int8"], "embeddings": ["int8"]}, "together": []},
]
SINGLE = [pytest.param((name,), marks=pytest.mark.slow) for name in ("gsi", "one_shot", "request")]
ABLATIONS = [(), ("gsi", "one_shot", "request"), ("kind",), ("depth",), *SINGLE]


def assert_same_choices(policy, encoder, requests, without=()):
    """The same plans of the network in torch and of that in NumPy."""
    trained = TrainedPolicy(policy, encoder)
    network = PolicyNetwork(network_weights(policy, without), encoder)
    plans = [trained.choose(request) for request in requests]
    assert [network.plan(request) for request in requests] == plans
    return set(plans)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_numpy_and_torch_choose_the_same_masks(name):
    context = block_context()
    model = untrained(name, context, spread=0.3, hidden=24, block_vectors=16)
    requests = [
        request_at(context, *shape, fraction)
        for shape in [(1, 10), (4, 500), (16, 2000)]
        for fraction in np.linspace(0.3, 0.99, 12)
    ]
    assert len(assert_same_choices(model.policy, encoder_for(context), requests)) > 5


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec['levels']}-{spec['together']}")
@pytest.mark.parametrize("vectors", [pytest.param(0, marks=pytest.mark.slow), 6])
@pytest.mark.parametrize("name", ["maskable_ppo", "dqn"])
def test_numpy_and_torch_choose_the_same_plans(name, vectors, spec):
    context = LadderContext(layers=6)
    encoder = encoder_of(context, spec)
    workload = {"name": "fixed", "batch_size": 8, "seq_len_tokens": 2000, "budget_fraction": 0.9}
    envs = make_envs(context, spec, workload=workload)
    model = untrained(name, context, spread=0.3, envs=envs, block_vectors=vectors, hidden=24)
    plans = assert_same_choices(model.policy, encoder, feasible(encoder, requests_of(context)))
    assert len(plans) >= 3


@pytest.mark.parametrize("without", ABLATIONS, ids=lambda names: "-".join(names) or "nothing")
@pytest.mark.parametrize("context", [block_context(), LadderContext(layers=6)], ids=["b", "i"])
def test_numpy_and_torch_agree_under_every_ablation(context, without):
    settings = {"block_vectors": 4, "without": list(without)}
    model = untrained("maskable_ppo", context, spread=0.3, **settings)
    assert_same_choices(model.policy, encoder_for(context), requests_for(context)[::2], without)


@pytest.mark.parametrize("kind", ["plain", "vectors"])
def test_an_exported_run_chooses_the_same_plans(runs, kind, tmp_path):
    context, _, folders = runs
    export_policy(folders[kind], context).save(tmp_path / "policy.safetensors")
    exported = load_policy(tmp_path / "policy.safetensors", context.memory)
    trained = TrainedPolicy.load(folders[kind], context)
    assert isinstance(exported, NetworkPolicy)
    assert exported.weight_levels == trained.weight_levels
    assert bool(exported.weight_levels) == lowers(context)
    for request in requests_for(context):
        assert exported.choose(request) == trained.choose(request)
    if not lowers(context):
        assert exported.order == context.gsi.full_order


def test_the_file_records_ladder_and_provenance(runs, tmp_path):
    context, _, folders = runs
    export_policy(folders["plain"], context).save(tmp_path / "policy.safetensors")
    file = PolicyFile.load(tmp_path / "policy.safetensors")
    ladder = encoder_for(context).ladder
    assert file.provenance["run"] == folders["plain"].name
    assert (file.provenance["agent"], file.provenance["seed"]) == ("maskable_ppo", 0)
    assert file.provenance["steps"] == 64
    assert file.weights.without == ("one_shot",)
    assert file.ladder == ladder.spec
    assert file.items == {item.name: list(item.levels) for item in ladder.items}


def test_a_policy_is_exported_for_another_model_where_it_transfers(runs):
    context, larger, folders = runs
    exported = NetworkPolicy(larger.memory, export_policy(folders["plain"], larger))
    trained = TrainedPolicy.load(folders["plain"], larger)
    request = request_at(larger, 8, 2000, 0.6)
    assert exported.choose(request) == trained.choose(request)
    with pytest.raises(ArtifactError, match="whose items have other levels than those of"):
        NetworkPolicy(larger.memory, export_policy(folders["plain"], context))


def test_an_unexportable_policy_raises_an_error_with_the_reason(runs, tmp_path):
    context, larger, folders = runs
    with pytest.raises(ArtifactError, match="another shape: .*policy_settings.block_vectors=0"):
        export_policy(folders["vectors"], larger)
    with pytest.raises(ArtifactError, match="holds no checkpoint; train an agent there first"):
        export_policy(tmp_path, context)
