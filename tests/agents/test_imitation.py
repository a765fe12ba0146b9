from dataclasses import replace

import pytest
import torch

from agents.algorithms import AgentConfigError
from agents.imitation import Demonstration, imitate, teacher_states
from agents.trained_policy import TrainedPolicy
from rap_env.context.base import item_order
from rap_env.errors import UnknownNameError
from rap_env.ladder.ladder_bytes import mask_bytes
from rap_env.ladder.observation import ObservationEncoder
from rap_env.plan import Plan
from rap_env.request import Request
from tests.agents.ladders import encoder_of
from tests.agents.policies import encoder_for, lowers, requests_for, untrained
from tests.agents.synthetic import ONE_OF_EACH_KIND

MASKS = [(1, 4, 7), (0, 2, 9, 10), (3, 5), (2, 6, 8, 11), (10,)]
SHAPES = [(1, 10), (16, 2000), (2, 100), (8, 500), (4, 4000)]
QUICK = {"updates": 300, "progress": False}


def demonstrated(context, pairs):
    """Plans for requests whose budgets are met by all of their steps."""
    return [
        Demonstration(replace(r, budget_bytes=context.memory.peak_bytes(plan, r)), plan)
        for r, plan in pairs
        if plan
    ]


def masks_of(context):
    """Masks that no search would find."""
    requests = [Request(*shape, budget_bytes=1) for shape in SHAPES]
    masks = [Plan.removing(*blocks) for blocks in MASKS]
    return demonstrated(context, zip(requests, masks, strict=True))


def greedy_plans(context):
    """Plans of the greedy order over items, which observations show."""
    ladder_bytes = encoder_of(context).ladder_bytes
    steps, pairs = item_order(context, ladder_bytes).steps, []
    for request in requests_for(context)[::4]:
        costs = ladder_bytes.costs(request.batch_size, request.seq_len_tokens)
        pairs.append((request, costs.lower_until_fits(steps, request.budget_bytes)))
    return demonstrated(context, pairs)


@pytest.fixture
def teacher(context):
    return masks_of(context)


@pytest.fixture
def builder(context):
    return ObservationEncoder(mask_bytes(context.memory), context.features)


@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_the_policy_matches_its_teacher(any_context, name):
    shown = (greedy_plans if lowers(any_context) else masks_of)(any_context)
    builder, model = encoder_for(any_context), untrained(name, any_context, block_vectors=8)
    agreement = imitate(model, shown, builder, **QUICK)
    policy = TrainedPolicy(model.policy, builder)
    assert [policy.choose(each.request) for each in shown] == [each.plan for each in shown]
    assert agreement > 0.99


def test_states_are_subsets_of_the_masks_that_leave_something_to_do(builder, teacher):
    batch = next(teacher_states(teacher, builder, batch_size=1000, seed=0))
    seen_masks = set()
    for right, valid in zip(batch.right, batch.valid, strict=True):
        left = frozenset(torch.nonzero(right).ravel().tolist())
        removed = frozenset(torch.nonzero(~valid).ravel().tolist())
        target = Plan(left | removed)
        assert target in [each.plan for each in teacher]
        assert left
        seen_masks.add((target, removed))
    assert len(seen_masks) == sum(2 ** len(blocks) - 1 for blocks in MASKS)  # every one of them
    assert torch.equal(batch.seen["action_mask"] > 0, batch.valid)


def test_imitation_does_not_train_values(context, builder, teacher):
    model = untrained("ppo", context, block_vectors=8)
    critic = [p.detach().clone() for p in model.policy.mlp_extractor.critic.parameters()]
    imitate(model, teacher, builder, updates=20, progress=False)
    after = list(model.policy.mlp_extractor.critic.parameters())
    assert all(map(torch.equal, critic, after))


def test_unsupported_imitation_is_rejected(context, builder, teacher):
    model = untrained("ppo", context, block_vectors=8)
    idle = [Demonstration(teacher[0].request, Plan())]
    with pytest.raises(AgentConfigError, match="none of 1 demonstrations"):
        imitate(model, idle, builder, **QUICK)
    with pytest.raises(AgentConfigError, match="none of 0 demonstrations"):
        imitate(model, [], builder, **QUICK)
    foreign = [Demonstration(teacher[0].request, Plan.removing(40))]
    with pytest.raises(UnknownNameError):
        imitate(model, foreign, builder, **QUICK)
