"""Methods that choose a mask or a plan without learning.

Each counts the KV cache unless its docstring states otherwise.

`BASELINES` has those that choose masks, `LADDER_BASELINES` those that choose plans over a ladder;
`make_baseline` makes one by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from agents.baselines.base import AnyBaseline, Baseline
from agents.baselines.evolutionary import EvolutionaryBaseline
from agents.baselines.knapsack import KnapsackBaseline
from agents.baselines.ladder import LADDER_BASELINES
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
from rap_env.errors import check_name

if TYPE_CHECKING:
    from rap_env.context.base import PruningContext
    from rap_env.ladder.item_bytes import LadderBytes

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

__all__ = ["BASELINES", "LADDER_BASELINES", "Baseline", "baselines_of", "make_baseline"]


def baselines_of(lowers: bool) -> Mapping[str, type[AnyBaseline[Any]]]:
    """The baselines of an environment: those over a ladder if its actions lower items."""
    return LADDER_BASELINES if lowers else BASELINES


def make_baseline(
    name: str,
    context: PruningContext,
    seed: int = 0,
    item_bytes: LadderBytes | None = None,
) -> AnyBaseline[Any]:
    """Make a baseline; the importance that it needs is measured or loaded.

    With `item_bytes` it chooses plans over that ladder, otherwise masks.

    Raises:
        UnknownNameError: There is no such baseline.
        ArtifactError: The context lacks an importance order or table that the baseline needs.
    """
    check_name("baseline", name, baselines_of(item_bytes is not None))
    if item_bytes is not None:
        return LADDER_BASELINES[name](context, item_bytes, seed)
    return BASELINES[name](context, seed)
