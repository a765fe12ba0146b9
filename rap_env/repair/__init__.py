"""Repair: a small stub in the place of a removed block. Importing it loads no torch.

The names below are imported from their modules on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rap_env.repair.distilling import DistillConfig, distill
    from rap_env.repair.fitting import FitConfig, fit_library
    from rap_env.repair.library import StubLibrary
    from rap_env.repair.per_mask import fit_for_mask

__all__ = [
    "DistillConfig",
    "FitConfig",
    "StubLibrary",
    "distill",
    "fit_for_mask",
    "fit_library",
]

_MODULES = {
    "DistillConfig": "distilling",
    "FitConfig": "fitting",
    "StubLibrary": "library",
    "distill": "distilling",
    "fit_for_mask": "per_mask",
    "fit_library": "fitting",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
