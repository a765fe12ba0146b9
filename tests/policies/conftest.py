"""Models on which methods choose: one with known losses, and tiny real ones."""

import pytest

from rap_env.ladder.items import Ladder
from rap_env.ladder.ladder_bytes import LadderBytes
from rap_env.request import Request
from tests.agents.conftest import _one_thread, real_context
from tests.agents.synthetic import SyntheticContext
from tests.envs.playing import LEVELS
from tests.envs.tiny_contexts import make_ladder_context

__all__ = ["_one_thread", "real_context"]


@pytest.fixture
def context():
    """attn, ffn of layers 0 to 3; an ffn block frees 3,000 bytes, an attn block 1,000 and cache."""
    return SyntheticContext([0.5, 4.0, 0.02, 0.30, 0.01, 0.04, 0.03, 0.20])


@pytest.fixture(scope="session")
def ladder_context(tmp_path_factory):
    """A tiny real model with all levels."""
    folder = tmp_path_factory.mktemp("importance")
    return make_ladder_context(gsi_method="lazy", folder=folder)


@pytest.fixture(scope="session")
def ladder_bytes(ladder_context) -> LadderBytes:
    memory = ladder_context.memory
    return LadderBytes(memory, Ladder.of(memory.facts, LEVELS, ("int8", "int4")))


@pytest.fixture
def between(ladder_bytes):
    """A request whose budget is a share of the way from the lowest levels to the native ones."""

    def make(shape: tuple[int, int], share: float) -> Request:
        costs = ladder_bytes.costs(*shape)
        least, most = costs.least_peak_bytes, costs.native_peak_bytes
        return Request(*shape, budget_bytes=int(least + share * (most - least)))

    return make
