"""Methods that choose plans over a ladder without learning.

Each has the name of the method over masks that it generalises. All count the KV cache except
``dense``.
"""

from __future__ import annotations

from agents.baselines.ladder.base import LadderBaseline
from agents.baselines.ladder.evolutionary import LadderEvolutionaryBaseline
from agents.baselines.ladder.orders import (
    LadderFrontierBaseline,
    LadderGSIBaseline,
    LadderKnapsackBaseline,
    LadderOneShotBaseline,
    LadderRandomBaseline,
    NativeBaseline,
)
from agents.baselines.ladder.packaged import MaskPolicyBaseline
from agents.baselines.ladder.score_model import ScoreModelBaseline
from agents.baselines.ladder.searches import (
    ExactLadderGreedyBaseline,
    LadderBeamBaseline,
    LadderGreedyBaseline,
)
from agents.baselines.ladder.uniform import UniformBaseline

LADDER_BASELINES: dict[str, type[LadderBaseline]] = {
    baseline.name: baseline
    for baseline in (
        UniformBaseline,
        LadderKnapsackBaseline,
        LadderRandomBaseline,
        LadderGreedyBaseline,
        ExactLadderGreedyBaseline,
        LadderBeamBaseline,
        LadderEvolutionaryBaseline,
        LadderFrontierBaseline,
        ScoreModelBaseline,
        LadderGSIBaseline,
        LadderOneShotBaseline,
        MaskPolicyBaseline,
        NativeBaseline,
    )
}

__all__ = ["LADDER_BASELINES", "LadderBaseline"]
