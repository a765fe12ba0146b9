"""The packaged policies, level costs and frontier."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from experiments.study.json_records import read_records
from rap_env.ladder.items import Ladder
from rap_env.ladder.ladder_bytes import LadderBytes
from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.policies.loading import load_policy, make_method
from rap_env.policies.network_policy import NetworkPolicy
from rap_env.policies.packaged_files import DEFAULT_MODEL, PACKAGED, default_facts
from rap_env.request import Request
from rap_env.scoring.fidelity import spearman


def test_policies_over_levels_meet_tight_budgets_with_few_removals(levelled, caplog):
    for path in PACKAGED.glob("*.ladder.safetensors"):
        policy = load_policy(path, levelled)
        assert isinstance(policy, NetworkPolicy)
        assert sorted(policy.order) == list(range(60))
        for shape in ((1, 128), (4, 512), (8, 2048)):
            removed = []
            for fraction in (1.0, 0.95, 0.7, 0.5, 0.3):
                request = Request.at_fraction(levelled, *shape, fraction)
                plan = policy.choose(request)
                assert levelled.peak_bytes(plan, request) <= request.budget_bytes
                removed.append(len(plan.removed))
            assert removed[0] == 0
            assert removed == sorted(removed)
        half = policy.choose(Request.at_fraction(levelled, 8, 2048, 0.5))
        assert not half.removed, "caches of fewer bits suffice"
    assert not caplog.records, "the files are of the packaged facts"


@pytest.fixture(scope="module")
def levelled():
    """The default model's byte arithmetic with native weights, as the package has it."""
    return MemoryModel(default_facts())


def test_the_level_costs_are_of_the_packaged_facts(levelled):
    costs = load_policy("knapsack", levelled).level_costs
    assert costs.window_tokens == 1024
    for layer in range(30):
        assert {"int8", "int4", "int2"} < set(costs.costs[f"layer{layer:02}.cache"])
        assert "removed" in costs.costs[f"layer{layer:02}.ffn"]


def test_the_level_costs_agree_with_measured_plans(levelled):
    """Plans of 60 budgets, from mild to harsh, as a study measured them on the text of the costs.

    None of them is among the plans that the costs were scaled to.
    """
    costs = load_policy("knapsack", levelled).level_costs
    record = Path(__file__).parents[2] / "results/gradient_plans/gradient_plans.jsonl"
    plans = {
        Plan.of(row["levels"]): np.mean(row["window_delta_nll"]["calibration"])
        for row in read_records(record)
    }
    assert len(plans) >= 50
    assert not {plan.to_json() for plan in plans} & set(costs.joint)
    predicted, measured = [costs.delta_nll(plan) for plan in plans], list(plans.values())
    assert spearman(predicted, measured) > 0.98
    mild = [(p, m) for p, m in zip(predicted, measured, strict=True) if 0.02 < m < 0.5]
    assert np.mean([abs(p / m - 1) for p, m in mild]) < 0.25


def test_the_knapsack_lowers_precision_before_it_removes(levelled):
    policy = load_policy("knapsack", levelled)
    for shape in ((1, 128), (4, 1024), (8, 2048)):
        least = levelled.peak_bytes(policy.choose(Request(*shape, 1)), Request(*shape, 1))
        rises = []
        for fraction in (1.0, 0.8, 0.6, 0.4, 0.2):
            request = Request.at_fraction(levelled, *shape, fraction)
            plan = policy.choose(request)
            assert levelled.peak_bytes(plan, request) <= max(request.budget_bytes, least)
            rises.append(policy.delta_nll(plan, shape[1]))
        assert rises[0] == 0
        assert rises == sorted(rises)
    half = policy.choose(Request.at_fraction(levelled, 8, 2048, 0.5))
    assert not half.removed
    assert half.caches


@pytest.mark.network
@pytest.mark.parametrize(
    ("weights", "names"),
    [
        ("native", ["knapsack", "rap", "rap-low-bits", "rap-recall"]),
        ("bf16", ["rap-v0", "frontier"]),
    ],
)
def test_the_packaged_policies_are_of_the_default_model(weights, names, caplog):
    from rap_env.models.files.loading import load_llm

    llm = load_llm(DEFAULT_MODEL, dtype="bfloat16", weights=weights)
    caplog.clear()  # the download, if there was one, is announced
    request = Request.at_fraction(MemoryModel(llm), 1, 128, 0.8)
    for name in names:
        assert load_policy(name, llm).choose(request)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


SHAPES = ((1, 128), (8, 2048), (16, 4096))


@pytest.fixture(scope="module")
def baseline(levelled):
    ladder_bytes = LadderBytes(levelled, Ladder.of(levelled.facts, "all"))
    return make_method("rap-v0", SimpleNamespace(memory=levelled), ladder_bytes)


def uniform(levelled, level):
    return Plan.uniform(levelled.facts.num_layers, caches=level)


@pytest.mark.parametrize("shape", SHAPES)
def test_it_removes_blocks_only_where_int8_caches_do_not_suffice(levelled, baseline, shape):
    int8 = levelled.peak_bytes(uniform(levelled, "int8"), Request(*shape, budget_bytes=1))
    assert baseline.choose(Request(*shape, budget_bytes=int8)) == uniform(levelled, "int8")
    tight = Request(*shape, budget_bytes=int(0.9 * int8))
    plan = baseline.choose(tight)
    assert plan.removed
    assert {level.name for _, level in plan.caches} == {"int8"}
    assert levelled.peak_bytes(plan, tight) <= tight.budget_bytes
    assert baseline.choose(Request(*shape, levelled.native_peak_bytes(*shape))) == Plan()
    assert baseline.evaluations == 0


def test_every_budget_of_the_ladder_is_met_or_answered_with_the_smallest_plan(levelled, baseline):
    for shape in SHAPES:
        everything = Plan.removing(*range(levelled.facts.num_blocks))
        least = levelled.peak_bytes(everything, Request(*shape, budget_bytes=1))
        plan = baseline.choose(Request(*shape, budget_bytes=least))
        assert plan.removed == everything.removed
