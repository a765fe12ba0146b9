"""Plans by the kind of text of the prompts: alone, in the chooser's floor, and in the engine."""

from functools import partial

import numpy as np
import pytest

from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.policies.knapsack import KnapsackPolicy, TextPolicy
from rap_env.policies.loading import load_policy
from rap_env.policies.packaged_files import default_facts
from rap_env.request import Request
from rap_env.runtime.memory_estimator import BatchShape
from tests.importance.test_text_kinds import kind_costs
from tests.runtime.harness import Harness, greedy
from tests.tiny import VOCAB_SIZE, tiny_llm

PROSE, CODE = list(range(3, 19)), list(range(VOCAB_SIZE - 18, VOCAB_SIZE - 2))
REQUEST_TOKENS = 40


@pytest.fixture(scope="module")
def memory():
    return MemoryModel(tiny_llm(layers=3))


@pytest.fixture(scope="module")
def costs(memory):
    return kind_costs(memory.facts)


@pytest.fixture(scope="module")
def policy(memory, costs):
    return TextPolicy(costs, partial(KnapsackPolicy, memory))


def tight(memory):
    """A request that needs a plan, for which both kinds have plans of their own."""
    return Request.at_fraction(memory, 2, REQUEST_TOKENS, 0.7)


def test_it_chooses_the_plan_of_the_kind_of_text(memory, costs, policy):
    request = tight(memory)
    own = [KnapsackPolicy(memory, one).choose(request) for one in costs.costs.values()]
    assert own[0] != own[1]
    assert policy.for_text((1.0, 0.0)).choose(request) == own[0]
    assert policy.for_text((0.0, 1.0)).choose(request) == own[1]
    assert policy.for_text((0.0, 1.0)).choose(request) == own[1]
    general = KnapsackPolicy(memory, costs.mean())
    assert policy.choose(request) == general.choose(request)
    assert policy.delta_nll(own[0], 40) == general.delta_nll(own[0], 40)
    assert (policy.name, policy.order) == ("knapsack-by-text", general.order)
    assert policy.weight_levels == general.weight_levels
    assert general.for_text((1.0, 0.0)) is general, "other policies do not see the text"


def test_it_is_loaded_from_its_file(memory, costs, policy, tmp_path):
    costs.save(tmp_path / "kinds.json")
    loaded = load_policy(tmp_path / "kinds.json", memory)
    assert isinstance(loaded, TextPolicy)
    request = tight(memory)
    for shares in ((), (1.0, 0.0), (0.5, 0.5)):
        assert loaded.for_text(shares).choose(request) == policy.for_text(shares).choose(request)


def test_the_floor_is_that_of_the_kind_of_text(memory, costs, policy):
    chooser = Harness(policy=policy, max_delta_nll=1.0).controller.chooser
    shapes = [BatchShape(2, REQUEST_TOKENS, text_shares=one) for one in ((1.0, 0.0), (0.0, 1.0))]
    plans = [one.choose(tight(memory)) for one in map(policy.for_text, ((1.0, 0.0), (0.0, 1.0)))]
    for plan in (*plans, Plan()):
        for shape, own in zip(shapes, costs.costs.values(), strict=True):
            rise = own.delta_nll(plan, REQUEST_TOKENS)
            assert chooser.rise(plan, REQUEST_TOKENS, shape.text_shares) == pytest.approx(rise)
            assert chooser.allows(plan, shape) == (rise <= 1.0)


def test_a_batch_of_several_prompts_has_the_mean_of_their_shares(policy):
    engine = Harness(policy=policy).engine()
    handles = [engine.submit(prompt, greedy(6)) for prompt in (PROSE, CODE)]
    while not all(handle.token_ids for handle in handles):
        engine.step()
    assert handles[0].text_shares != handles[1].text_shares
    assert engine._scheduler.batch.shape.text_shares == (0.5, 0.5)


@pytest.fixture(scope="module")
def default():
    return MemoryModel(default_facts())


def test_the_packaged_policy_chooses_by_text(default):
    policy = load_policy("knapsack-by-text", default)
    assert policy.name == "knapsack-by-text"
    assert policy.text_kinds.names == ["prose", "dialogue", "questions", "self"]
    request, plans = Request(8, 2048, 124_610_944), []
    for shares in ((), *(tuple(one) for one in np.eye(4).tolist())):
        plan = policy.for_text(shares).choose(request)
        assert default.peak_bytes(plan, request) <= request.budget_bytes
        plans.append(plan)
    assert len(set(plans)) == 5
    assert policy.for_text((1.0, 0.0, 0.0, 0.0)).delta_nll(plans[1], 1024) > 0
