"""Random policies over levels for a model with known costs: no training, no torch."""

import numpy as np

from rap_env.ladder.features import ItemImportance
from rap_env.ladder.items import Ladder
from rap_env.ladder.ladder_bytes import LadderBytes
from rap_env.ladder.observation import ObservationEncoder
from rap_env.memory import MemoryModel
from rap_env.policies.network_policy import PolicyFile
from tests.policies.made_policies import PROVENANCE, drawn_weights
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


def encoder(model=None, spec=SPEC) -> ObservationEncoder:
    model = model or memory()
    items = ladder(model, spec)
    return ObservationEncoder(LadderBytes(model, items), importance(items))


def policy_file(model=None, spec=SPEC, **settings) -> PolicyFile:
    """An exported policy with random weights."""
    made = encoder(model, spec)
    return PolicyFile.made(drawn_weights("ladder", len(made.ladder), **settings), made, PROVENANCE)
