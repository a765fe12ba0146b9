from dataclasses import replace

import pytest
import torch

from agents.algorithms import AgentConfig, make_model
from agents.hyperparameters import AgentConfigError
from agents.imitation import Demonstration, ImitationConfig, TeacherStates, imitate
from agents.trained_policy import TrainedPolicy
from agents.training import make_vector_env
from rap_env.errors import UnknownNameError
from rap_env.ladder.ladder_bytes import mask_bytes
from rap_env.ladder.observation import ObservationEncoder
from rap_env.plan import Plan
from rap_env.request import Request
from tests.agents.synthetic import ONE_OF_EACH_KIND, make_envs

MASKS = [(1, 4, 7), (0, 2, 9, 10), (3, 5), (2, 6, 8, 11), (10,)]
SHAPES = [(1, 10), (16, 2000), (2, 100), (8, 500), (4, 4000)]
QUICK = ImitationConfig(updates=300, batch_size=64)


@pytest.fixture
def teacher(context):
    """Masks that no search would find; the budget of each request is met by all of its mask."""
    shown = []
    for blocks, shape in zip(MASKS, SHAPES, strict=True):
        mask = Plan.removing(*blocks)
        request = Request(*shape, context.memory.peak_bytes(mask, Request(*shape, 1)))
        shown.append(Demonstration(request, mask))
    return shown


@pytest.fixture
def builder(context):
    return ObservationEncoder(mask_bytes(context.memory), context.features)


def new_model(name, context, **settings):
    settings = {"n_envs": 2, "policy_settings": {"block_vectors": 8}, **settings}
    config = AgentConfig(name, **settings)
    return make_model(config, make_vector_env(config, make_envs(context)))


def weights(model):
    return torch.nn.utils.parameters_to_vector(model.policy.parameters()).detach()


@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_the_policy_matches_its_teacher(context, builder, teacher, name):
    model = new_model(name, context, normalize_reward=False)
    result = imitate(model, teacher, builder, QUICK, progress=False)
    policy = TrainedPolicy(model.policy, builder)
    assert [policy.choose(one.request) for one in teacher] == [one.plan for one in teacher]
    assert result.agreement > 0.99


def test_states_are_subsets_of_the_masks_that_leave_something_to_do(builder, teacher):
    states = TeacherStates(teacher, builder, batch_size=1000, seed=0)
    batch = states.draw()
    seen_masks = set()
    for right, valid in zip(batch.right, batch.valid, strict=True):
        left = frozenset(torch.nonzero(right).ravel().tolist())
        gone = frozenset(torch.nonzero(~valid).ravel().tolist())
        target = Plan(left | gone)
        assert target in [one.plan for one in teacher]
        assert left
        seen_masks.add((target, gone))
    assert len(seen_masks) == sum(2 ** len(blocks) - 1 for blocks in MASKS)  # every one of them
    assert torch.equal(batch.seen["action_mask"] > 0, batch.valid)


def test_imitation_does_not_train_values(context, builder, teacher):
    model = new_model("ppo", context)
    critic = [p.detach().clone() for p in model.policy.mlp_extractor.critic.parameters()]
    imitate(model, teacher, builder, replace(QUICK, updates=20), progress=False)
    after = list(model.policy.mlp_extractor.critic.parameters())
    assert all(torch.equal(one, other) for one, other in zip(critic, after, strict=True))


def test_unsupported_imitation_is_rejected(context, builder, teacher):
    model = new_model("ppo", context)
    idle = [Demonstration(teacher[0].request, Plan())]
    with pytest.raises(AgentConfigError, match="none of 1 demonstrations"):
        imitate(model, idle, builder)
    foreign = [Demonstration(teacher[0].request, Plan.removing(40))]
    with pytest.raises(UnknownNameError):
        imitate(model, foreign, builder)
    with pytest.raises(
        AgentConfigError, match="updates must be a whole number of at least 1, not 0"
    ):
        ImitationConfig(updates=0)
