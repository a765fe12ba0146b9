"""The exported policy of `RAPLadder-v0` chooses the plans of the trained one."""

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
from rap_env.errors import ArtifactError, InvalidRequestError
from rap_env.ladder.item_rows import DEPTH
from rap_env.ladder.items import KINDS
from rap_env.ladder.plan_observer import PlanObserver
from rap_env.plan import Plan
from rap_env.policies.item_network import ItemNetwork, ItemNetworkWeights
from rap_env.policies.loading import load_policy
from rap_env.policies.network import LadderPolicy, LadderPolicyFile
from rap_env.request import Request
from tests.agents.ladders import LadderContext, builder_of, feasible, make_envs, requests_of
from tests.agents.test_ladder_agents import model_of, short

SPECS = [
    {"levels": "all", "together": ["int8", "int4"]},
    {"levels": "all", "together": ["int8", "int4", "int4-window512"]},
    {"levels": "all", "together": []},
    {"levels": "masks", "together": []},
    {"levels": {"caches": ["int8"], "embeddings": ["int8"]}, "together": []},
]
ABLATIONS = [
    ("gsi", "one_shot", "request"),
    ("kind",),
    ("depth",),
    *(pytest.param((name,), marks=pytest.mark.slow) for name in ("gsi", "one_shot", "request")),
]


def assert_same_choices(context, builder, policy, network):
    trained, found = TrainedPolicy(policy, builder), set()
    for request in feasible(builder, requests_of(context)):
        plan = trained.choose(request)
        assert network.plan(request) == plan
        found.add(plan)
    return found


def network_of(policy, builder, without=()):
    return ItemNetwork(network_weights(policy, ItemNetworkWeights, without), builder)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec['levels']}-{spec['together']}")
@pytest.mark.parametrize("vectors", [pytest.param(0, marks=pytest.mark.slow), 6])
@pytest.mark.parametrize("name", ["maskable_ppo", "dqn"])
def test_numpy_and_torch_choose_the_same_plans(name, vectors, spec):
    context = LadderContext(layers=6)
    builder = builder_of(context, spec)
    torch.manual_seed(0)
    config = AgentConfig(name, n_envs=1, policy_settings={"block_vectors": vectors, "hidden": 24})
    workload = {"name": "fixed", "batch_size": 8, "seq_len_tokens": 2000, "budget_fraction": 0.9}
    envs = make_envs(context, spec, workload=workload)
    policy = make_model(config, make_vector_env(config, envs)).policy
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    plans = assert_same_choices(context, builder, policy, network_of(policy, builder))
    assert len(plans) >= 3


@pytest.mark.parametrize("without", ABLATIONS, ids="-".join)
def test_numpy_and_torch_agree_under_every_ablation(without):
    context = LadderContext(layers=6)
    policy = model_of("maskable_ppo", context, 0.3, block_vectors=4, without=list(without)).policy
    builder = builder_of(context)
    assert_same_choices(context, builder, policy, network_of(policy, builder, without))


@pytest.mark.parametrize("without", [(), ("kind",), ("kind", "depth")], ids="-".join)
def test_only_a_network_that_sees_kinds_and_depths_depends_on_them(without):
    """Those that are hidden show neither in the items themselves nor in what is made from them."""
    context = LadderContext(layers=4)
    policy = model_of("maskable_ppo", context, 0.3, without=list(without)).policy
    builder, request = builder_of(context), requests_of(context)[-1]
    seen = builder.build(request, builder.ladder.plan([1] * len(builder.ladder)))
    kinds, depths = seen["ladder"].copy(), seen["ladder"].copy()
    kinds[:, : len(KINDS)] = np.roll(kinds[:, : len(KINDS)], 1, axis=1)
    depths[:, DEPTH] = 1 - depths[:, DEPTH]
    batch = {name: np.stack([seen[name]] * 3) for name in seen}
    batch["ladder"] = np.stack([seen["ladder"], kinds, depths])
    with torch.no_grad():
        scores, *changed = action_scores(policy, as_tensors(batch)).numpy()
    apart = [float(np.abs(scores - other).max()) for other in changed]
    assert [gap > 1e-4 for gap in apart] == ["kind" not in without, "depth" not in without], apart


@pytest.mark.parametrize("name", ALGORITHMS)
def test_scores_of_batches_are_those_of_torch(name):
    """Up to a constant for each observation, which changes no choice."""
    context = LadderContext(layers=4)
    policy, builder = model_of(name, context, 0.3, block_vectors=4).policy, builder_of(context)
    requests, rng = requests_of(context), np.random.default_rng(0)
    observer, state = PlanObserver(builder, requests), None
    which = np.arange(len(requests))
    state = observer.start(len(which))
    network = network_of(policy, builder)
    for _ in range(12):
        seen = observer.observe(which, state)
        with torch.no_grad():
            expected = action_scores(policy, as_tensors(seen)).numpy()
        found, valid = network.scores(seen), seen["action_mask"] > 0
        for row in np.flatnonzero(valid.any(axis=1)):
            apart = (found - expected)[row, valid[row]]
            assert np.ptp(apart) < 2e-3 * max(1.0, np.ptp(expected[row, valid[row]]))
        state = observer.act(which, state, rng.integers(len(builder.ladder), size=len(which)))


def test_samples_fit_and_differ_and_the_first_is_greedy():
    context = LadderContext()
    policy, builder = model_of("ppo", context, 0.1).policy, builder_of(context)
    network = network_of(policy, builder)
    for request in feasible(builder, requests_of(context))[::5]:
        plans = network.sample(request, 12)
        assert plans[0] == network.plan(request)
        assert plans == network.sample(request, 12)
        peaks = [context.memory.peak_bytes(plan, request) for plan in plans]
        assert max(peaks) <= request.budget_bytes
    assert len(set(plans)) > 2


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Short trainings on a model of 3 layers."""
    folders, context = {}, LadderContext()
    kinds = {"plain": {"without": ["one_shot"]}, "vectors": {"block_vectors": 4}}
    for kind, settings in kinds.items():
        folders[kind] = tmp_path_factory.mktemp(kind)
        config = short("maskable_ppo", 64, policy_settings=settings)
        train(config, make_envs(context), folders[kind], progress=False)
    return context, folders


@pytest.fixture(scope="module")
def path(runs, tmp_path_factory):
    context, folders = runs
    found = tmp_path_factory.mktemp("exported") / "policy.safetensors"
    export_policy(folders["plain"], context).save(found)
    return found


@pytest.mark.parametrize("kind", [pytest.param("plain", marks=pytest.mark.slow), "vectors"])
def test_an_exported_run_chooses_the_same_plans(runs, kind, tmp_path):
    context, folders = runs
    export_policy(folders[kind], context).save(tmp_path / "policy.safetensors")
    exported = load_policy(tmp_path / "policy.safetensors", context.memory)
    trained = TrainedPolicy.load(folders[kind], context)
    assert isinstance(exported, LadderPolicy)
    assert exported.lowers
    for request in feasible(builder_of(context), requests_of(context)):
        assert exported.choose(request) == trained.choose(request)


def test_best_of_takes_the_plan_with_the_lowest_score(runs, path):
    context, _ = runs
    file = LadderPolicyFile.load(path)
    policy = LadderPolicy(context.memory, file, best_of=16, score=context.scorer.nll_many)
    greedy = LadderPolicy(context.memory, file)
    request = Request.at_fraction(context.memory, 2, 500, 0.5)
    assert context.scorer.nll(policy.choose(request)) <= context.scorer.nll(greedy.choose(request))
    with pytest.raises(InvalidRequestError, match="best_of=4 needs a way to score plans"):
        LadderPolicy(context.memory, file, best_of=4)


def test_the_file_records_ladder_and_provenance(runs, path):
    context, folders = runs
    file = LadderPolicyFile.load(path)
    assert file.ladder == builder_of(context).ladder.spec
    assert file.provenance["run"] == folders["plain"].name
    assert file.provenance["steps"] == 64
    assert file.weights.without == ("one_shot",)
    assert file.items == {i.name: list(i.levels) for i in builder_of(context).ladder.items}


def test_it_predicts_what_the_order_over_items_added(runs, path):
    context, _ = runs
    policy = load_policy(path, context.memory)
    reached = builder_of(context).importance.reached
    numbers = policy.ladder.numbers
    assert policy.delta_nll(Plan()) == 0
    plan = Plan.of({"layer01.ffn": "int8", "embeddings": "int8"})
    expected = reached[numbers["layer01.ffn"], 1] + reached[numbers["embeddings"], 1]
    assert policy.delta_nll(plan) == pytest.approx(expected)


def test_a_policy_is_exported_for_another_model_where_it_transfers(runs):
    _, folders = runs
    larger = LadderContext(layers=5, seed=1)
    exported = LadderPolicy(larger.memory, export_policy(folders["plain"], larger))
    request = Request.at_fraction(larger.memory, 8, 2000, 0.5)
    assert exported.choose(request) == TrainedPolicy.load(folders["plain"], larger).choose(request)
    with pytest.raises(ArtifactError, match="vector for each of 10 items, but this model has 16"):
        export_policy(folders["vectors"], larger)


def test_the_file_serves_other_items_with_their_importance_only(runs, path):
    context, folders = runs
    other = LadderContext(layers=5, seed=1)
    with pytest.raises(ArtifactError, match="whose items have other levels than those of made"):
        load_policy(path, other.memory)
    importance = builder_of(other).importance
    file = LadderPolicyFile.load(path)
    policy = LadderPolicy(other.memory, file, importance)
    request = Request.at_fraction(other.memory, 8, 2000, 0.5)
    assert policy.choose(request) == TrainedPolicy.load(folders["plain"], other).choose(request)
    with pytest.raises(ArtifactError, match="importance of made must have 10 x 7 values"):
        LadderPolicy(context.memory, file, importance)
