"""Methods that choose a mask without learning.

Each counts the KV cache unless its docstring states otherwise.

`BASELINES` is the registry; `make_baseline` makes one by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agents.baselines.base import Baseline
from agents.baselines.evolutionary import EvolutionaryBaseline
from agents.baselines.knapsack import KnapsackBaseline
from agents.baselines.orders import (
    AttentionOnlyBaseline,
    BlockInfluenceBaseline,
    DenseBaseline,
    FFNOnlyBaseline,
    FrontierBaseline,
    GSIBaseline,
    OneShotBaseline,
    OneShotPerByteBaseline,
    RandomBaseline,
    ShortGPTBaseline,
)
from agents.baselines.searches import (
    BeamBaseline,
    GreedyPerByteBaseline,
    GreedySwapsBaseline,
    OracleBaseline,
    SLEBBaseline,
)
from rap_env.errors import UnknownNameError

if TYPE_CHECKING:
    from rap_env.context.base import PruningContext

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

__all__ = ["BASELINES", "Baseline", "make_baseline"]


def make_baseline(name: str, context: PruningContext, seed: int = 0) -> Baseline:
    """Make a baseline; the importance that it needs is measured or loaded.

    Raises:
        UnknownNameError: There is no such baseline.
        ArtifactError: The context lacks an importance order or table that the baseline needs.
    """
    if name not in BASELINES:
        raise UnknownNameError("baseline", name, BASELINES)
    return BASELINES[name](context, seed)
