"""Importance of blocks: one-shot scores, greedy sequential importance (GSI), the frontier.

Artifacts (`OneShotProfile`, `GSIProfile`, `Frontier`) load without torch. The names below are
imported from their modules on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rap_env.importance.frontier import Frontier
    from rap_env.importance.frontier_search import FrontierConfig, build_frontier
    from rap_env.importance.gsi_search import gsi, gsi_rounds
    from rap_env.importance.one_shot_scores import one_shot
    from rap_env.importance.profiles import GSIProfile, OneShotProfile

__all__ = [
    "Frontier",
    "FrontierConfig",
    "GSIProfile",
    "OneShotProfile",
    "build_frontier",
    "gsi",
    "gsi_rounds",
    "one_shot",
]

_MODULES = {
    "Frontier": "rap_env.importance.frontier",
    "FrontierConfig": "rap_env.importance.frontier_search",
    "GSIProfile": "rap_env.importance.profiles",
    "OneShotProfile": "rap_env.importance.profiles",
    "build_frontier": "rap_env.importance.frontier_search",
    "gsi": "rap_env.importance.gsi_search",
    "gsi_rounds": "rap_env.importance.gsi_search",
    "one_shot": "rap_env.importance.one_shot_scores",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
