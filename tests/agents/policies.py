"""Policies with random weights for contexts of masks and of levels."""

import torch

from agents.algorithms import AgentConfig, make_model
from agents.training import make_vector_env
from rap_env.ladder.ladder_bytes import mask_bytes
from rap_env.ladder.observation import ObservationEncoder
from tests.agents import ladders, synthetic


def lowers(context):
    """Whether its environment lowers items, instead of removing blocks."""
    return isinstance(context, ladders.LadderContext)


def encoder_for(context):
    if lowers(context):
        return ladders.encoder_of(context)
    return ObservationEncoder(mask_bytes(context.memory), context.features)


def envs_for(context, **settings):
    return (ladders if lowers(context) else synthetic).make_envs(context, **settings)


def requests_for(context):
    """Requests that some plan fits."""
    return ladders.feasible(encoder_for(context), ladders.requests_of(context))


def untrained(name, context, spread=None, envs=None, **settings):
    """A model as it is before training, or with random weights of some spread."""
    torch.manual_seed(0)
    config = AgentConfig(name, n_envs=2, policy_settings=settings)
    model = make_model(config, make_vector_env(config, envs or envs_for(context)))
    if spread:
        for parameter in model.policy.parameters():
            torch.nn.init.normal_(parameter, std=spread)
    return model
