from dataclasses import replace

import numpy as np
import pytest
import torch

from agents.algorithms import AgentConfig, make_model
from agents.imitation import Demonstration, ImitationConfig, Lesson, TeacherStates, imitate
from agents.observations import make_encoder
from agents.settings import AgentConfigError
from agents.trained_policy import TrainedPolicy
from agents.training import make_vector_env
from rap_env.errors import UnknownNameError
from rap_env.ladder.observation import ObservationBuilder
from rap_env.plan import Plan
from rap_env.request import Request
from tests.agents.synthetic import ONE_OF_EACH_KIND, SyntheticContext, make_envs

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
        shown.append(Demonstration(request, mask, -float(context.scorer.loss(mask))))
    return shown


@pytest.fixture
def builder(context):
    return ObservationBuilder(context.memory, context.features)


def new_model(name, context, **settings):
    settings = {"n_envs": 2, "policy_settings": {"block_vectors": 8}, **settings}
    config = AgentConfig(name, **settings)
    return make_model(config, make_vector_env(config, make_envs(context)))


def weights(model):
    return torch.nn.utils.parameters_to_vector(model.policy.parameters()).detach()


@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_the_policy_matches_its_teacher(context, builder, teacher, name):
    model = new_model(name, context)
    result = imitate(model, [Lesson(teacher, builder)], QUICK, progress=False)
    policy = TrainedPolicy(model.policy, builder)
    assert [policy.choose(one.request) for one in teacher] == [one.plan for one in teacher]
    assert result.agreement > 0.99


def test_states_are_subsets_of_the_masks_that_leave_something_to_do(builder, teacher):
    states = TeacherStates(teacher, builder, gamma=0.5, batch_size=1000, seed=0)
    batch = states.draw()
    seen_masks = set()
    for right, valid, value in zip(batch.right, batch.valid, batch.returns, strict=True):
        left = frozenset(torch.nonzero(right).ravel().tolist())
        gone = frozenset(torch.nonzero(~valid).ravel().tolist())
        target = Plan(left | gone)
        shown = next(one for one in teacher if one.plan == target)
        assert left
        assert value == pytest.approx(shown.episode_return * 0.5 ** (len(left) - 1))
        seen_masks.add((target, gone))
    assert len(seen_masks) == sum(2 ** len(blocks) - 1 for blocks in MASKS)  # every one of them
    assert torch.equal(batch.seen["action_mask"] > 0, batch.valid)


@pytest.mark.parametrize("normalize", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_values_are_in_the_unit_of_the_models_rewards(context, builder, teacher, normalize):
    model = new_model("ppo", context, normalize_reward=normalize)
    config = ImitationConfig(updates=400, batch_size=64)
    imitate(model, [Lesson(teacher, builder)], config, progress=False)
    rewards = np.array([one.episode_return for one in teacher])
    if normalize:
        steps = [0.0] * sum(len(blocks) - 1 for blocks in MASKS)  # only the last one pays
        unit = np.std([*steps, *rewards])
        normalised = model.get_vec_normalize_env().normalize_reward(rewards)
        assert normalised == pytest.approx(rewards / unit, rel=1e-3)
        rewards = normalised
    seen = [builder.build(one.request, Plan()) for one in teacher]
    stacked = {key: np.stack([one[key] for one in seen]) for key in seen[0]}
    with torch.no_grad():
        values = model.policy.predict_values(model.policy.obs_to_tensor(stacked)[0])
    assert values.ravel().numpy() == pytest.approx(rewards, abs=0.15 * float(np.ptp(rewards)))


@pytest.mark.slow
def test_q_values_of_the_teachers_blocks_are_returns_and_the_highest(context, builder, teacher):
    model = new_model("masked_dqn", context, normalize_reward=False)
    config = ImitationConfig(updates=400, batch_size=64, margin=0.5)
    imitate(model, [Lesson(teacher, builder)], config, progress=False)
    for one in teacher:
        tensors, _ = model.policy.obs_to_tensor(builder.build(one.request, Plan()))
        with torch.no_grad():
            values = model.policy.q_net(tensors)[0].numpy()
            assert np.array_equal(model.policy.q_net_target(tensors)[0].numpy(), values)
        right = np.isin(np.arange(12), list(one.plan.removed))
        assert values[right].mean() == pytest.approx(one.episode_return, abs=0.4)
        assert values[right].max() - values[~right].max() > 0.3


def test_unknown_returns_do_not_train_values(context, builder, teacher):
    unknown = [Demonstration(one.request, one.plan) for one in teacher]
    model = new_model("ppo", context)
    critic = [p.detach().clone() for p in model.policy.mlp_extractor.critic.parameters()]
    imitate(model, [Lesson(unknown, builder)], QUICK, progress=False)
    after = list(model.policy.mlp_extractor.critic.parameters())
    assert all(torch.equal(one, other) for one, other in zip(critic, after, strict=True))
    assert model.get_vec_normalize_env().ret_rms.var == 1.0
    policy = TrainedPolicy(model.policy, builder)
    assert [policy.choose(one.request) for one in teacher] == [one.plan for one in teacher]


@pytest.mark.parametrize("name", ["maskable_ppo", "dqn"])
def test_same_seed_same_policy(context, builder, teacher, name):
    found = []
    for seed in (0, 0, 1):
        model = new_model(name, context)
        config = ImitationConfig(updates=20, batch_size=16, seed=seed)
        imitate(model, [Lesson(teacher, builder)], config, progress=False)
        found.append(weights(model))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_lessons_on_two_models_are_both_learned(context, builder, teacher):
    """Each block of the other model costs what its mirror image costs here, and goes with it."""
    other = SyntheticContext(context.scorer.costs[::-1])
    shown = []
    for one in teacher:
        mask = Plan.removing(*(len(other.scorer.costs) - 1 - block for block in one.plan.removed))
        request = replace(one.request, budget_bytes=1)
        budget = other.memory.peak_bytes(mask, request)
        shown.append(Demonstration(replace(request, budget_bytes=budget), mask))
    model = new_model("maskable_ppo", context)
    lessons = [Lesson(teacher, builder), Lesson(shown, make_encoder(other, None))]
    result = imitate(model, lessons, QUICK, progress=False)
    assert result.agreement > 0.9
    for lesson in lessons:
        policy = TrainedPolicy(model.policy, lesson.encoder)
        found = [policy.choose(one.request) == one.plan for one in lesson.shown]
        assert np.mean(found) > 0.8
    with pytest.raises(AgentConfigError, match="at least one lesson"):
        imitate(model, [], QUICK)
    with pytest.raises(AgentConfigError, match="A batch of 1 states cannot"):
        imitate(model, lessons, ImitationConfig(updates=1, batch_size=1))


def test_unsupported_imitation_is_rejected(context, builder, teacher):
    model = new_model("ppo", context)
    idle = [Demonstration(teacher[0].request, Plan())]
    with pytest.raises(AgentConfigError, match="none of 1 demonstrations"):
        imitate(model, [Lesson(idle, builder)])
    foreign = [Demonstration(teacher[0].request, Plan.removing(40))]
    with pytest.raises(UnknownNameError):
        imitate(model, [Lesson(foreign, builder)])
    with pytest.raises(AgentConfigError, match="updates of imitation must be at least 1, not 0"):
        ImitationConfig(updates=0)
