"""How much each block matters: one-shot scores and greedy sequential importance (GSI)."""

from rap_env.importance.features import ImportanceFeatures
from rap_env.importance.gsi import GSIProfile, gsi
from rap_env.importance.one_shot import OneShotProfile, one_shot

__all__ = ["GSIProfile", "ImportanceFeatures", "OneShotProfile", "gsi", "one_shot"]
