"""Random policies over blocks for a model with known costs: no training, no torch."""

import numpy as np

from rap_env.ladder.features import ImportanceFeatures
from rap_env.ladder.ladder_bytes import mask_bytes
from rap_env.ladder.observation import ObservationEncoder
from rap_env.memory import MemoryModel
from rap_env.policies.network import NetworkWeights
from rap_env.policies.network_policy import PolicyFile
from rap_env.policies.network_rows import ROWS
from tests.made_facts import made_facts

PROVENANCE = {"agent": "maskable_ppo", "seed": 0, "steps": 64}


def facts(layers=6, **changed):
    """An attention block of 1,000 bytes and an ffn block of 3,000 in each layer."""
    return made_facts(layers, **changed)


def memory(layers=6, **changed):
    return MemoryModel(facts(layers, **changed))


def features(layers=6, seed=0):
    rng = np.random.default_rng(seed)
    rise = rng.lognormal(-3, 0.8, 2 * layers)
    rank = np.argsort(rng.permutation(2 * layers)) / (2 * layers - 1)
    return ImportanceFeatures(rise, rank, rng.lognormal(-2, 0.8, 2 * layers))


def encoder(model=None) -> ObservationEncoder:
    model = model or memory()
    return ObservationEncoder(mask_bytes(model), features(model.facts.num_layers))


def drawn_weights(rows, count, vectors=0, without=(), hidden=8, seed=0) -> NetworkWeights:
    """Random weights for rows of blocks or items."""
    rng = np.random.default_rng(seed)
    width = ROWS[rows].width(vectors)

    def drawn(*shape):
        return rng.normal(0, 0.5, shape).astype(np.float32)

    return NetworkWeights(
        first_weight=drawn(hidden, width),
        first_bias=drawn(hidden),
        second_weight=drawn(hidden, hidden),
        second_bias=drawn(hidden),
        last_weight=drawn(hidden),
        linear_weight=drawn(width),
        vectors=drawn(count, vectors) if vectors else drawn(0, 0),
        rows=rows,
        without=without,
    )


def policy_file(layers=6, model=None, *, vectors=0, without=(), **changed) -> PolicyFile:
    """An exported policy with random weights."""
    made = encoder(model or memory(layers, **changed))
    weights = drawn_weights("blocks", len(made.ladder), vectors, without)
    return PolicyFile.made(weights, made, PROVENANCE)
