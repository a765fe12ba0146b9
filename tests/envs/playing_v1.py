"""Environments of v1 on a context, and random episodes in them."""

from __future__ import annotations

import torch
from gymnasium.vector import SyncVectorEnv
from transformers import AutoModelForCausalLM

from rap_env.context.live import LiveContext
from rap_env.envs.ladder import RAPLadderEnv, RAPLadderVectorEnv
from rap_env.models.live.elastic import ElasticLLM
from rap_env.request import Request
from tests.envs.conftest import LAYERS, tiny_tokens
from tests.envs.playing import USUAL
from tests.envs.playing_vectors import NUM_ENVS
from tests.tiny import randomise, tiny_config

LONG = {"batch_size": 16, "seq_len_tokens": 500}
"""A request whose cache is most of its bytes."""
LEVELS = {
    "weights": ["int8", "int4", "removed"],
    "caches": ["int8", "int4", "int4-window32"],
    "embeddings": ["int8", "int4"],
}
"""All levels of items, with a window that is short enough for a tiny model's text."""

ITEMS = 3 * LAYERS + 1


def make_ladder_context(length=128, **settings) -> LiveContext:
    """A tiny model with a text that is longer than its windows, so that all levels differ."""
    torch.set_num_threads(1)
    config = tiny_config(layers=LAYERS)
    config.max_position_embeddings = 512
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomise(model)
    llm = ElasticLLM(model, None, name="tiny-llama")
    text = tiny_tokens(windows=2, length=length)
    return LiveContext(llm, text, **{"importance": "one_shot", "progress": False, **settings})


ONE_BY_ONE = {**USUAL, "levels": LEVELS, "together": []}


def make_v1(context, **settings) -> RAPLadderEnv:
    return RAPLadderEnv(context=context, **{**ONE_BY_ONE, **settings})


def make_vector_v1(context, **settings) -> RAPLadderVectorEnv:
    settings = {**ONE_BY_ONE, **settings}
    return RAPLadderVectorEnv(context=context, num_envs=NUM_ENVS, **settings)


def make_sync_v1(context, mode, steps=None, **settings) -> SyncVectorEnv:
    def one():
        return make_v1(context, max_steps=steps, **settings)

    return SyncVectorEnv([one] * NUM_ENVS, autoreset_mode=mode)


def long_request(context, fraction: float = 0.6) -> Request:
    return Request.at_fraction(context.memory, *LONG.values(), fraction)
