"""How much each block matters: one-shot scores and greedy sequential importance (GSI)."""

from rap_env.features import ImportanceFeatures
from rap_env.importance.gsi import GSIProfile, gsi, gsi_rounds
from rap_env.importance.one_shot import OneShotProfile, one_shot

__all__ = [
    "GSIProfile",
    "ImportanceFeatures",
    "OneShotProfile",
    "gsi",
    "gsi_rounds",
    "one_shot",
]
