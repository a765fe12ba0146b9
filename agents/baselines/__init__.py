"""Methods that choose a mask or a plan without learning.

Each counts the KV cache unless its docstring states otherwise.

`BASELINES` has those that choose masks, `LADDER_BASELINES` those that choose plans over a ladder;
`make_baseline` makes one by name, also one of another package.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from agents.baselines.base import AnyBaseline, Baseline
from agents.baselines.evolutionary import EvolutionaryBaseline
from agents.baselines.knapsack import KnapsackBaseline
from agents.baselines.ladder import LADDER_BASELINES, LadderBaseline
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
from rap_env.plugins import Plugin, PluginError, find_plugin

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

__all__ = [
    "BASELINES",
    "LADDER_BASELINES",
    "Baseline",
    "LadderBaseline",
    "baselines_of",
    "check_baseline",
    "make_baseline",
]


def baselines_of(lowers: bool) -> Mapping[str, type[AnyBaseline[Any]]]:
    """The baselines of an environment: those over a ladder if its actions lower items."""
    return LADDER_BASELINES if lowers else BASELINES


def check_baseline(name: str, lowers: bool) -> None:
    """Check that there is a baseline for an environment.

    Args:
        name: One of `baselines_of`, the name of an entry point of another package, or
            ``package.module:factory``.
        lowers: Whether it chooses plans over a ladder.

    Raises:
        UnknownNameError: There is no such baseline.
        PluginError: The baseline of another package cannot be loaded, or is for the other
            environment.
    """
    own = baselines_of(lowers)
    if name not in own:
        plugin = find_plugin("baseline", name, own)
        factory = plugin.load()
        if isinstance(factory, type):
            _check_base(plugin, factory, lowers)


def _check_base(plugin: Plugin, made: type, lowers: bool) -> None:
    base: type = LadderBaseline if lowers else Baseline
    if not issubclass(made, base):
        what = "plans (env=ladder)" if lowers else "masks (env=default)"
        raise PluginError(
            f"{plugin} cannot choose {what}: {made.__name__} does not derive from "
            f"agents.baselines.{base.__name__}."
        )


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
        PluginError: The baseline of another package cannot be loaded or made.
    """
    own = baselines_of(item_bytes is not None)
    arguments = (context, seed) if item_bytes is None else (context, item_bytes, seed)
    if name in own:
        return own[name](*arguments)
    plugin = find_plugin("baseline", name, own)
    made: AnyBaseline[Any] = plugin.make(*arguments)
    _check_base(plugin, type(made), item_bytes is not None)
    made.source_sha256 = plugin.source_sha256
    return made
