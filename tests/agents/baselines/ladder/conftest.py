"""A tiny model with all levels, and requests at which weights or caches are most of the bytes."""

from __future__ import annotations

import pytest

from rap_env.ladder.item_bytes import LadderBytes
from rap_env.ladder.items import Ladder
from rap_env.request import Request
from tests.envs.playing_v1 import LEVELS, make_ladder_context

TOGETHER = ("int8", "int4")
SHAPES = ((1, 100), (16, 500))


@pytest.fixture(scope="session")
def context(tmp_path_factory):
    folder = tmp_path_factory.mktemp("importance")
    return make_ladder_context(gsi_method="lazy", folder=folder)


@pytest.fixture(scope="session")
def item_bytes(context) -> LadderBytes:
    return LadderBytes(context.memory, Ladder.of(context.memory.facts, LEVELS, TOGETHER))


@pytest.fixture
def request_at(item_bytes):
    """A request whose budget is a share of the way from the lowest levels to the native ones."""

    def make(shape: tuple[int, int], share: float) -> Request:
        costs = item_bytes.costs(*shape)
        least, most = costs.least_peak_bytes, costs.dense_peak_bytes
        return Request(*shape, budget_bytes=int(least + share * (most - least)))

    return make
