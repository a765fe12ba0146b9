"""A small model with known losses, and one real tiny model, for agents to learn on."""

import numpy as np
import pytest
import torch

from agents.algorithms import AgentConfig
from agents.training import train
from rap_env.context.base import PruningContext
from rap_env.importance.level_costs import LevelCosts
from rap_env.importance.plan_search import PlanSearchConfig, build_plan_table
from rap_env.ladder.items import Ladder
from rap_env.ladder.ladder_bytes import LadderBytes
from rap_env.request import Request
from rap_env.scoring.corpus import Corpus
from tests.agents.ladders import LadderContext
from tests.agents.policies import envs_for
from tests.agents.synthetic import SyntheticContext, block_context
from tests.envs.tiny_contexts import live_context
from tests.tiny import VOCAB_SIZE, tiny_llm


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def context() -> SyntheticContext:
    """6 layers; the first is important, and some neighbours cost far more together than alone."""
    costs = np.random.default_rng(0).lognormal(-3, 0.8, 12)
    costs[:2] = 0.6, 4.0
    return SyntheticContext(costs, interaction=2.0, cap=12.0)


@pytest.fixture(params=["masks", "levels"])
def any_context(request, context):
    """That of masks, and one of levels."""
    return context if request.param == "masks" else LadderContext()


@pytest.fixture(scope="session", params=["masks", "levels"])
def runs(request, tmp_path_factory):
    """A context, a larger one, and folders of short trainings on the first by their policy."""
    of_masks = block_context(6), block_context(9, seed=1)
    contexts = of_masks if request.param == "masks" else (LadderContext(), LadderContext(5, seed=1))
    folders = {}
    for kind, settings in {
        "plain": {"policy_settings": {"without": ["one_shot"]}},
        "vectors": {"policy_settings": {"block_vectors": 4}},
    }.items():
        folders[kind] = tmp_path_factory.mktemp(kind)
        config = AgentConfig("maskable_ppo", total_timesteps=64, n_envs=2,
                             hyperparameters={"n_steps": 32}, **settings)  # fmt: skip
        train(config, envs_for(contexts[0]), folders[kind], progress=False)
    return *contexts, folders


@pytest.fixture(scope="session")
def real_context() -> PruningContext:
    """A real model of 3 layers with random weights."""
    torch.set_num_threads(1)
    tokens = torch.randint(3, VOCAB_SIZE, (2, 8), generator=torch.Generator().manual_seed(0))
    return with_frontier(live_context(tiny_llm(layers=3), Corpus.of_tokens(tokens)))


def with_frontier(context: PruningContext) -> PruningContext:
    """The context with a small table of the best known masks."""
    requests = [Request.at_fraction(context.memory, 2, 16, fraction) for fraction in (0.9, 0.7)]
    context.frontier = build_plan_table(
        context.scorer,
        LevelCosts.of_removals(context.one_shot),
        LadderBytes(context.memory, Ladder.of(context.memory.facts, "masks")),
        requests,
        PlanSearchConfig(evaluations=20, members=2),
    )
    return context
