"""Random item-wise policies for a model whose costs are known by formula: no training, no torch."""

from __future__ import annotations

import numpy as np

from rap_env.ladder.item_bytes import LadderBytes
from rap_env.ladder.items import Ladder
from rap_env.ladder.observation import ItemImportance, ItemObservationBuilder
from rap_env.memory import MemoryModel
from rap_env.policies.item_network import ItemNetworkWeights
from rap_env.policies.network import LadderPolicyFile
from tests.policies.test_knapsack import facts as made_facts

SPEC = {"levels": "all", "together": ["int8", "int4"]}


def memory(layers=3, **changed):
    return MemoryModel(made_facts(layers, **changed))


def ladder(model, spec=SPEC):
    return Ladder.of(model.facts, **spec)


def importance(items: Ladder, seed=0) -> ItemImportance:
    rng = np.random.default_rng(seed)
    one_shot, place = rng.random((2, len(items), items.width))
    reached = np.cumsum(rng.random((len(items), items.width)), axis=1)
    reached[:, 0] = 0
    return ItemImportance(one_shot, place, reached)


def builder(model, spec=SPEC) -> ItemObservationBuilder:
    items = ladder(model, spec)
    return ItemObservationBuilder(LadderBytes(model, items), importance(items))


def weights(count, hidden=8, item_vectors=0, without=(), seed=0) -> ItemNetworkWeights:
    rng = np.random.default_rng(seed)
    width = ItemNetworkWeights.row_width(item_vectors)

    def drawn(*shape):
        return rng.normal(0, 0.5, shape).astype(np.float32)

    return ItemNetworkWeights(
        first_weight=drawn(hidden, width),
        first_bias=drawn(hidden),
        second_weight=drawn(hidden, hidden),
        second_bias=drawn(hidden),
        last_weight=drawn(hidden),
        linear_weight=drawn(width),
        vectors=drawn(count, item_vectors) if item_vectors else drawn(0, 0),
        without=without,
    )


def policy_file(model=None, spec=SPEC, **settings) -> LadderPolicyFile:
    """An exported policy with random weights."""
    model = model or memory()
    items = ladder(model, spec)
    return LadderPolicyFile.made(
        weights(len(items), **settings),
        importance(items),
        items,
        model.facts,
        {"agent": "maskable_ppo", "seed": 0, "steps": 64},
    )
