"""llama.cpp's settings of a plan. Without torch."""

from __future__ import annotations

from rap_env.errors import UnsupportedModelError
from rap_env.plan import Plan

CACHE_TYPES = {"native": "f16", "int8": "q8_0", "int4": "q4_1"}
"""llama.cpp's formats of a cache by level; it has one for all keys and one for all values."""


def cache_type(plan: Plan, num_layers: int) -> str:
    """llama.cpp's format of the caches of a plan, for ``-ctk`` and ``-ctv``.

    Args:
        plan: The plan.
        num_layers: Layers of the model.

    Raises:
        UnsupportedModelError: Its kept caches have several levels, or one without a counterpart.
    """
    kept = (n for n in range(num_layers) if 2 * n not in plan.removed)
    levels = {plan.cache_level(layer).name for layer in kept} or {"native"}
    if len(levels) > 1 or levels - CACHE_TYPES.keys():
        raise UnsupportedModelError(
            "llama.cpp stores the caches of all layers in one format, those of the levels "
            f"{', '.join(CACHE_TYPES)}, but the plan has {', '.join(sorted(levels))}; choose "
            "another plan."
        )
    return CACHE_TYPES[levels.pop()]


def cache_flags(cache: str) -> str:
    """llama.cpp's options for caches in a format; quantised values need flash attention."""
    return f"-ctk {cache} -ctv {cache}{'' if cache == 'f16' else ' -fa on'}"
