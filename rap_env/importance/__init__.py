"""How much blocks matter: one-shot scores, greedy sequential importance (GSI), the frontier."""

from rap_env.importance.frontier import Frontier
from rap_env.importance.frontier_search import FrontierConfig, build_frontier
from rap_env.importance.gsi import GSIProfile, gsi, gsi_rounds
from rap_env.importance.one_shot import OneShotProfile, one_shot
from rap_env.observation import ImportanceFeatures

__all__ = [
    "Frontier",
    "FrontierConfig",
    "GSIProfile",
    "ImportanceFeatures",
    "OneShotProfile",
    "build_frontier",
    "gsi",
    "gsi_rounds",
    "one_shot",
]
