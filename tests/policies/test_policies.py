"""Policies: the interface, what each chooses, and what `load_policy` loads by name or path."""

from dataclasses import replace

import pytest

from rap_env.errors import (
    ArtifactError,
    InfeasibleBudgetError,
    InvalidRequestError,
    UnknownNameError,
)
from rap_env.importance.plan_table import PlanTable
from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.policies import packaged_files
from rap_env.policies.base import Policy, as_policy
from rap_env.policies.loading import OrderPolicy, check_policy, load_policy
from rap_env.policies.network_policy import NetworkPolicy
from rap_env.policies.registry import policy_names
from rap_env.policies.tables import TablePolicy
from rap_env.request import Request
from tests.policies.made_policies import memory, policy_file
from tests.policies.test_knapsack import costs as level_costs
from tests.policies.test_knapsack import facts as levelled_facts

SCORES = {(): 2.5, (0,): 2.6, (1,): 2.7, (0, 1): 2.9, (0, 1, 3): 3.4}


def frontier(layers=6, fingerprint="a" * 64):
    """A few known masks of the made model."""
    return PlanTable(
        num_layers=layers,
        dense_nll=2.5,
        scores={Plan.removing(*indices): nll for indices, nll in SCORES.items()},
        evaluations_run=len(SCORES),
        seconds=0.0,
        settings={},
        provenance={"model": "made", "fingerprint": fingerprint, "scoring": {}},
    )


def at(fraction, shape=(1, 10), layers=6):
    return Request.at_fraction(memory(layers), *shape, fraction)


def just_fits(*removed, shape=(1, 10)):
    """A request whose budget equals the peak bytes of a mask."""
    need = memory().peak_bytes(Plan.removing(*removed), Request(*shape, 1))
    return Request(*shape, need)


def test_an_order_policy_removes_blocks_until_the_request_fits():
    policy = OrderPolicy(memory(), [3, 0, 5, 1])
    assert policy.choose(at(1.0)) == Plan()
    assert policy.choose(just_fits(3)) == Plan.removing(3)
    short = Request(1, 10, just_fits(3).budget_bytes - 1)
    assert policy.choose(short) == Plan.removing(3, 0)
    assert policy.choose(Request(1, 10, 1)) == Plan.removing(3, 0, 5, 1)
    assert policy.order == (3, 0, 5, 1)


def test_an_order_of_another_model_is_rejected():
    with pytest.raises(UnknownNameError, match=r"layer06\.attn"):
        OrderPolicy(memory(), [0, 12])


def test_the_frontier_policy_returns_the_best_known_mask_that_fits():
    policy = TablePolicy(memory(), frontier())
    assert policy.choose(at(1.0)) == Plan()
    assert policy.choose(just_fits(0)) == Plan.removing(0)
    assert policy.choose(just_fits(1)) == Plan.removing(1)
    assert policy.choose(just_fits(0, 1)) == Plan.removing(0, 1)
    assert policy.choose(Request(1, 10, 1)) == Plan.removing(0, 1, 3), "the one that needs least"
    assert policy.name == "frontier"


def test_a_frontier_of_another_shape_is_rejected():
    with pytest.raises(ArtifactError, match="with 4 layers, but made has 6"):
        TablePolicy(memory(), frontier(4))


@pytest.mark.parametrize("policy", ["order", "frontier", "network"])
def test_requests_that_the_model_cannot_serve_are_rejected(policy):
    made = {
        "order": OrderPolicy(memory(), range(12)),
        "frontier": TablePolicy(memory(), frontier()),
        "network": NetworkPolicy(memory(), policy_file()),
    }[policy]
    with pytest.raises(InvalidRequestError, match="from 1 to 4096 tokens"):
        made.choose(Request(1, 5000, 10**9))


class TestLoadPolicy:
    def test_by_path(self, tmp_path):
        policy_file().save(tmp_path / "policy.safetensors")
        frontier().save(tmp_path / "masks.json")
        network = load_policy(tmp_path / "policy.safetensors", memory())
        table = load_policy(str(tmp_path / "masks.json"), memory())
        assert (type(network), type(table)) == (NetworkPolicy, TablePolicy)
        request = at(0.7)
        assert network.choose(request) == NetworkPolicy(memory(), policy_file()).choose(request)

    def test_level_costs_by_path_and_by_name(self, tmp_path, monkeypatch):
        made = levelled_facts(packed=True)
        path = tmp_path / "smollm2-135m.levels.json"
        level_costs(made).save(path)
        live = MemoryModel(made)
        request = Request.at_fraction(live, 1, 700, 0.8)
        chosen = load_policy(path, live).choose(request)
        assert chosen.levels
        monkeypatch.setattr(packaged_files, "PACKAGED", tmp_path)
        named = load_policy("knapsack", live)
        assert (named.name, named.choose(request)) == ("knapsack", chosen)

    def test_a_model_without_level_costs_is_served_by_a_rule_with_levels_that_need_no_text(
        self, caplog
    ):
        facts = packaged_files.default_facts("bf16")
        live = MemoryModel(replace(facts, name="made", fingerprint="a" * 64))
        policy = load_policy("knapsack", live)
        assert (policy.name, policy.weight_levels) == ("uniform", ("int8", "int4"))
        for fraction, lowered in ((1, False), (0.5, True)):
            request = Request.at_fraction(live, 1, 700, fraction)
            plan = policy.choose(request)
            live.check_fits(plan, request)
            assert (bool(plan.weights), bool(plan.removed_names)) == (lowered, False)
        (record,) = caplog.records
        assert "made has no measured level costs" in record.getMessage()
        assert "`rap prepare made` makes them once (about 3 minutes)" in record.getMessage()

    def test_blocks_whose_cost_is_not_known_are_removed_only_where_that_is_allowed(self):
        facts = packaged_files.default_facts("bf16")
        live = MemoryModel(replace(facts, name="made", fingerprint="a" * 64))
        request = Request.at_fraction(live, 1, 700, 0.23)
        smallest = load_policy("knapsack", live).choose(request)
        assert not smallest.removed
        with pytest.raises(InfeasibleBudgetError, match="without any block the model needs"):
            live.check_fits(smallest, request)
        allowed = load_policy("knapsack", live, allow_removal=True)
        plan = allowed.choose(request)
        live.check_fits(plan, request)
        assert plan.removed == frozenset(allowed.order[: len(plan.removed)])

    def test_every_method_is_served_on_the_packaged_scores(self):
        served = MemoryModel(packaged_files.default_facts())
        request = Request.at_fraction(served, 4, 512, 0.8)
        for name in ("random", "one_shot", "one_shot_per_byte"):
            plan = load_policy(name, served).choose(request)
            assert served.peak_bytes(plan, request) <= request.budget_bytes
        with pytest.raises(ArtifactError, match="scores of smollm2-135m.* only, and this policy"):
            load_policy("random", memory())

    def test_names_are_listed_and_checked_without_a_model(self):
        for name in (*policy_names(), packaged_files.packaged_file("levels.json"), "module:name"):
            check_policy(name)
        with pytest.raises(UnknownNameError, match="Did you mean 'knapsack'"):
            check_policy("knapsac")

    @pytest.mark.parametrize("name", ["rapp", "some/policy.safetensors", "masks.json"])
    def test_unknown_names_and_missing_files(self, name):
        with pytest.raises(UnknownNameError, match="known are 'block_influence', 'cost_per_byte'"):
            load_policy(name, memory())


REQUEST = Request(1, 16, 10**6)


class OnlyChooses:
    """What a user writes: a name and `choose`, and members that no policy has."""

    name = "own"
    order = (3, 1)

    def choose(self, request):
        return Plan.of({"layer00.ffn": "removed"})


class Chooses(OnlyChooses, Policy):
    """The same as a `Policy`, whose optional members count."""


def test_an_object_that_only_chooses_has_no_optional_member():
    policy = as_policy(OnlyChooses())
    plan = policy.choose(REQUEST)
    assert (policy.name, plan.removed_names) == ("own", ("layer00.ffn",))
    assert (policy.weight_levels, policy.order) == ((), None)
    assert policy.delta_nll(plan, 16) is None


def test_a_policy_is_taken_as_it_is():
    policy = Chooses()
    assert as_policy(policy) is policy
    assert policy.order == (3, 1)


@pytest.mark.parametrize("wrong", [3, "rap", Chooses, None])
def test_what_cannot_choose_is_no_policy(wrong):
    with pytest.raises(InvalidRequestError, match="is no policy: it needs a name and choose"):
        as_policy(wrong)
