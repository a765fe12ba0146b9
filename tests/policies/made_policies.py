"""Random policies for a model whose costs are known by formula: no training, no torch."""

from __future__ import annotations

import numpy as np

from rap_env.block_rows import row_width
from rap_env.ladder.observation import ImportanceFeatures
from rap_env.memory import MemoryModel
from rap_env.model_facts import ModelFacts
from rap_env.policies.block_network import NetworkWeights
from rap_env.policies.policy_file import PolicyFile, PolicyModel, order_of


def facts(layers=6, fingerprint="a" * 64, name="made"):
    """An attention block of 1,000 bytes and an ffn block of 3,000 in each layer."""
    return ModelFacts(
        name=name,
        fingerprint=fingerprint,
        dtype="bfloat16",
        block_param_bytes=(1000, 3000) * layers,
        base_bytes=500,
        kv_bytes_per_token=(4,) * layers,
        kv_window_tokens=(None,) * layers,
        itemsize=2,
        hidden_size=1,
        ffn_width=4,
        vocab_size=1,
        max_positions=4096,
    )


def memory(layers=6, **changed):
    return MemoryModel(facts(layers, **changed))


def features(layers=6, seed=0):
    rng = np.random.default_rng(seed)
    rise = rng.lognormal(-3, 0.8, 2 * layers)
    rank = np.argsort(rng.permutation(2 * layers)) / (2 * layers - 1)
    return ImportanceFeatures(rise, rank, rng.lognormal(-2, 0.8, 2 * layers))


def weights(layers=6, hidden=8, block_vectors=0, without=(), seed=0):
    rng = np.random.default_rng(seed)
    width = row_width(block_vectors)

    def drawn(*shape):
        return rng.normal(0, 0.5, shape).astype(np.float32)

    return NetworkWeights(
        first_weight=drawn(hidden, width),
        first_bias=drawn(hidden),
        second_weight=drawn(hidden, hidden),
        second_bias=drawn(hidden),
        last_weight=drawn(hidden),
        linear_weight=drawn(width),
        vectors=drawn(2 * layers, block_vectors) if block_vectors else drawn(0, 0),
        without=without,
    )


def policy_file(layers=6, block_vectors=0, without=(), **changed):
    """An exported policy with random weights."""
    seen = features(layers)
    return PolicyFile(
        weights(layers, block_vectors=block_vectors, without=without),
        seen,
        order_of(seen),
        PolicyModel.of(facts(layers, **changed)),
        {"agent": "maskable_ppo", "seed": 0, "steps": 64},
    )
