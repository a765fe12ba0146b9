"""Ways to choose a mask without learning, each aware of the KV cache and counted in evaluations.

A plain dictionary is the registry: `make_baseline` makes one by name.
"""

from __future__ import annotations

from agents.baselines.base import Baseline, MaskChoice
from agents.baselines.beam import BeamBaseline
from agents.baselines.bench import Bench
from agents.baselines.evolutionary import EvolutionaryBaseline
from agents.baselines.frontier import FrontierBaseline
from agents.baselines.greedy import GreedyPerByteBaseline
from agents.baselines.knapsack import KnapsackBaseline
from agents.baselines.layers import ShortGPTBaseline, SLEBBaseline
from agents.baselines.oracle import OracleBaseline
from agents.baselines.orders import (
    AttentionOnlyBaseline,
    BlockInfluenceBaseline,
    DenseBaseline,
    FFNOnlyBaseline,
    GSIBaseline,
    OneShotBaseline,
    OneShotPerByteBaseline,
    RandomBaseline,
)
from agents.baselines.swaps import GreedySwapsBaseline
from rap_env.errors import UnknownNameError

BASELINES: dict[str, type[Baseline]] = {
    baseline.name: baseline
    for baseline in (
        RandomBaseline,
        GSIBaseline,
        GreedyPerByteBaseline,
        GreedySwapsBaseline,
        BeamBaseline,
        EvolutionaryBaseline,
        FrontierBaseline,
        OracleBaseline,
        OneShotBaseline,
        OneShotPerByteBaseline,
        BlockInfluenceBaseline,
        ShortGPTBaseline,
        SLEBBaseline,
        KnapsackBaseline,
        AttentionOnlyBaseline,
        FFNOnlyBaseline,
        DenseBaseline,
    )
}

__all__ = ["BASELINES", "Baseline", "Bench", "MaskChoice", "make_baseline"]


def make_baseline(name: str, context: Bench, seed: int = 0) -> Baseline:
    """The baseline called `name`, its shared profiles measured or loaded.

    Raises:
        UnknownNameError: There is no such baseline.
    """
    if name not in BASELINES:
        raise UnknownNameError("baseline", name, BASELINES)
    return BASELINES[name](context, seed)
