"""The exported policy chooses what the trained one does, action for action."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from agents.algorithms import ALGORITHMS, AgentConfig, make_model
from agents.export import export_policy, network_weights
from agents.observations import as_tensors
from agents.sb3_policies import action_scores
from agents.trained_policy import TrainedPolicy
from agents.training import make_vector_env, train
from rap_env.errors import ArtifactError
from rap_env.ladder.items import KINDS
from rap_env.ladder.observation import ITEM_FEATURES, ObservationBuilder
from rap_env.plan import Plan
from rap_env.policies.loading import load_policy
from rap_env.policies.network import PolicyNetwork
from rap_env.policies.network_policy import NetworkPolicy, PolicyFile
from rap_env.request import Request
from tests.agents import ladders, synthetic
from tests.agents.ladders import LadderContext, encoder_of, feasible, requests_of
from tests.agents.synthetic import SyntheticContext, request_at
from tests.agents.test_ladder_agents import model_of, short

SPECS = [
    {"levels": "all", "together": ["int8", "int4"]},
    {"levels": "all", "together": ["int8", "int4", "int4-window512"]},
    {"levels": "all", "together": []},
    {"levels": "masks", "together": []},
    {"levels": {"caches": ["int8"], "embeddings": ["int8"]}, "together": []},
]
SINGLE = [pytest.param((name,), marks=pytest.mark.slow) for name in ("gsi", "one_shot", "request")]
ABLATIONS = [(), ("gsi", "one_shot", "request"), ("kind",), ("depth",), *SINGLE]


def block_context(layers=15, seed=0):
    costs = np.random.default_rng(seed).lognormal(-3, 0.8, 2 * layers)
    return SyntheticContext(costs, interaction=2.0, cap=12.0)


def block_requests(context):
    return [
        request_at(context, *shape, fraction)
        for shape in [(1, 10), (4, 500), (16, 2000)]
        for fraction in np.linspace(0.3, 0.99, 12)
    ]


def encoder_for(context):
    if isinstance(context, LadderContext):
        return encoder_of(context)
    return ObservationBuilder(context.memory, context.features)


def untrained(name, envs, policy="blockwise", spread=None, **settings):
    """A policy as it is before training, or with random weights of some spread."""
    torch.manual_seed(0)
    config = AgentConfig(name, policy, n_envs=1, policy_settings=settings)
    model = make_model(config, make_vector_env(config, envs))
    if spread:
        for parameter in model.policy.parameters():
            torch.nn.init.normal_(parameter, std=spread)
    return model.policy


def assert_same_choices(policy, encoder, requests, without=()):
    """The same plans of the network in torch and of that in NumPy."""
    trained = TrainedPolicy(policy, encoder)
    network = PolicyNetwork(network_weights(policy, without), encoder)
    plans = [trained.choose(request) for request in requests]
    assert [network.plan(request) for request in requests] == plans
    return set(plans)


@pytest.mark.parametrize(
    ("vectors", "spread"),
    [pytest.param(0, None, marks=pytest.mark.slow), (16, 0.3)],
    ids=["first", "random"],
)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_numpy_and_torch_choose_the_same_masks(name, vectors, spread):
    context = block_context()
    envs = synthetic.make_envs(context)
    policy = untrained(name, envs, spread=spread, hidden=24, block_vectors=vectors)
    masks = assert_same_choices(policy, encoder_for(context), block_requests(context))
    assert len(masks) > 5


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec['levels']}-{spec['together']}")
@pytest.mark.parametrize("vectors", [pytest.param(0, marks=pytest.mark.slow), 6])
@pytest.mark.parametrize("name", ["maskable_ppo", "dqn"])
def test_numpy_and_torch_choose_the_same_plans(name, vectors, spec):
    context = LadderContext(layers=6)
    encoder = encoder_of(context, spec)
    workload = {"name": "fixed", "batch_size": 8, "seq_len_tokens": 2000, "budget_fraction": 0.9}
    envs = ladders.make_envs(context, spec, workload=workload)
    policy = untrained(name, envs, spread=0.3, block_vectors=vectors, hidden=24)
    plans = assert_same_choices(policy, encoder, feasible(encoder, requests_of(context)))
    assert len(plans) >= 3


@pytest.mark.parametrize("without", ABLATIONS, ids=lambda names: "-".join(names) or "nothing")
@pytest.mark.parametrize("context", [block_context(), LadderContext(layers=6)], ids=["b", "i"])
def test_numpy_and_torch_agree_under_every_ablation(context, without):
    module = ladders if isinstance(context, LadderContext) else synthetic
    encoder, settings = encoder_for(context), {"block_vectors": 4, "without": list(without)}
    requests = feasible(encoder, requests_of(context))
    policy = untrained("maskable_ppo", module.make_envs(context), spread=0.3, **settings)
    assert_same_choices(policy, encoder, requests, without)


def test_numpy_and_torch_agree_with_stubs(repaired_context):
    policy = untrained("dqn", synthetic.make_envs(repaired_context), spread=0.3)
    requests = [request_at(repaired_context, 8, 64, share) for share in (0.95, 0.85, 0.75)]
    assert_same_choices(policy, encoder_for(repaired_context), requests)


@pytest.mark.parametrize("without", [(), ("kind",), ("kind", "depth")], ids="-".join)
def test_only_a_network_that_sees_kinds_and_depths_depends_on_them(without):
    """Those that are hidden show neither in the items themselves nor in what is made from them."""
    context, depth = LadderContext(layers=4), ITEM_FEATURES.index("depth")
    policy = model_of("maskable_ppo", context, 0.3, without=list(without)).policy
    encoder, request = encoder_of(context), requests_of(context)[-1]
    seen = encoder.build(request, encoder.ladder.plan([1] * len(encoder.ladder)))
    kinds, depths = seen["ladder"].copy(), seen["ladder"].copy()
    kinds[:, : len(KINDS)] = np.roll(kinds[:, : len(KINDS)], 1, axis=1)
    depths[:, depth] = 1 - depths[:, depth]
    batch = {name: np.stack([seen[name]] * 3) for name in seen}
    batch["ladder"] = np.stack([seen["ladder"], kinds, depths])
    with torch.no_grad():
        scores, *changed = action_scores(policy, as_tensors(batch)).numpy()
    apart = [float(np.abs(scores - other).max()) for other in changed]
    assert [gap > 1e-4 for gap in apart] == ["kind" not in without, "depth" not in without], apart


@pytest.mark.parametrize("name", ["maskable_ppo", "dqn"])
def test_an_mlp_scores_no_single_blocks(name, context):
    with pytest.raises(ArtifactError, match="only block-wise policies can be exported"):
        network_weights(untrained(name, synthetic.make_envs(context), policy="mlp"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Short trainings on blocks of 6 layers, and on items of 3."""
    of_blocks, of_items, folders = block_context(6), LadderContext(), {}
    for kind, (name, policy, settings) in {
        "plain": ("maskable_ppo", "blockwise", {"without": ["one_shot"]}),
        "vectors": ("ppo", "blockwise", {"block_vectors": 4}),
        "mlp": ("ppo", "mlp", {}),
    }.items():
        folders[kind] = tmp_path_factory.mktemp(kind)
        config = AgentConfig(
            name, policy, 64, 2, hyperparameters={"n_steps": 32}, policy_settings=settings
        )
        train(config, synthetic.make_envs(of_blocks), folders[kind], progress=False)
    for kind, settings in (
        ("items", {"without": ["one_shot"]}),
        ("item_vectors", {"block_vectors": 4}),
    ):
        folders[kind] = tmp_path_factory.mktemp(kind)
        config = short("maskable_ppo", 64, policy_settings=settings)
        train(config, ladders.make_envs(of_items), folders[kind], progress=False)
    contexts = {kind: of_items if "item" in kind else of_blocks for kind in folders}
    return contexts, folders


@pytest.mark.parametrize("kind", ["plain", "vectors", "items", "item_vectors"])
def test_an_exported_run_chooses_the_same_plans(runs, kind, tmp_path):
    contexts, folders = runs
    context = contexts[kind]
    export_policy(folders[kind], context).save(tmp_path / "policy.safetensors")
    exported = load_policy(tmp_path / "policy.safetensors", context.memory)
    trained = TrainedPolicy.load(folders[kind], context)
    assert isinstance(exported, NetworkPolicy)
    assert exported.lowers == ("item" in kind) == trained.lowers
    encoder = encoder_for(context)
    requests = requests_of(context) if "item" in kind else block_requests(context)
    for request in feasible(encoder, requests):
        assert exported.choose(request) == trained.choose(request)
    if kind == "plain":
        assert exported.order == context.gsi.full_order


@pytest.mark.parametrize(("kind", "count"), [("plain", 12), ("items", 6)])
def test_the_file_records_ladder_and_provenance(runs, tmp_path, kind, count):
    contexts, folders = runs
    export_policy(folders[kind], contexts[kind]).save(tmp_path / "policy.safetensors")
    file = PolicyFile.load(tmp_path / "policy.safetensors")
    ladder = encoder_for(contexts[kind]).ladder
    assert file.provenance["run"] == folders[kind].name
    assert (file.provenance["agent"], file.provenance["seed"]) == ("maskable_ppo", 0)
    assert file.provenance["steps"] == 64
    assert file.num_blocks == count
    assert file.weights.without == ("one_shot",)
    assert file.ladder == ladder.spec
    assert file.items == {item.name: list(item.levels) for item in ladder.items}


def test_it_predicts_what_the_order_over_items_added(runs):
    contexts, folders = runs
    context = contexts["items"]
    policy = NetworkPolicy(context.memory, export_policy(folders["items"], context))
    reached, numbers = encoder_of(context).importance.reached, policy.ladder.numbers
    assert policy.delta_nll(Plan()) == 0
    plan = Plan.of({"layer01.ffn": "int8", "embeddings": "int8"})
    expected = reached[numbers["layer01.ffn"], 1] + reached[numbers["embeddings"], 1]
    assert policy.delta_nll(plan) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("kind", "larger", "words"),
    [
        ("plain", block_context(9, seed=1), "vector for each of 12 blocks, but this model has 18"),
        ("items", LadderContext(5, seed=1), "vector for each of 10 items, but this model has 16"),
    ],
)
def test_a_policy_is_exported_for_another_model_where_it_transfers(runs, kind, larger, words):
    contexts, folders = runs
    exported = NetworkPolicy(larger.memory, export_policy(folders[kind], larger))
    trained = TrainedPolicy.load(folders[kind], larger)
    request = Request.at_fraction(larger.memory, 8, 2000, 0.6)
    assert exported.choose(request) == trained.choose(request)
    with pytest.raises(ArtifactError, match=words):
        export_policy(folders["vectors" if kind == "plain" else "item_vectors"], larger)
    file, importance = export_policy(folders[kind], contexts[kind]), encoder_for(larger).importance
    with pytest.raises(ArtifactError, match="whose items have other levels than those of"):
        NetworkPolicy(larger.memory, file)
    served = NetworkPolicy(larger.memory, file, importance)
    assert served.choose(request) == trained.choose(request)


def test_an_unexportable_policy_raises_an_error_with_the_reason(runs, tmp_path):
    contexts, folders = runs
    with pytest.raises(ArtifactError, match="is 'mlp', but only block-wise policies"):
        export_policy(folders["mlp"], contexts["mlp"])
    with pytest.raises(ArtifactError, match="holds no checkpoint; train an agent there first"):
        export_policy(tmp_path, contexts["plain"])
