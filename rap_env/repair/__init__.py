"""Repair: a small stub in the place of a removed block. Importing it does not import torch.

The names below are imported from their modules on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rap_env.repair.config import REPAIRS, DistillConfig, FitConfig, repair_label

if TYPE_CHECKING:
    from rap_env.repair.cached_library import open_library
    from rap_env.repair.distilling import distill
    from rap_env.repair.fitting import fit_for_mask, fit_library
    from rap_env.repair.stub_library import StubLibrary

__all__ = [
    "REPAIRS",
    "DistillConfig",
    "FitConfig",
    "StubLibrary",
    "distill",
    "fit_for_mask",
    "fit_library",
    "open_library",
    "repair_label",
]

_MODULES = {
    "StubLibrary": "stub_library",
    "distill": "distilling",
    "fit_for_mask": "fitting",
    "fit_library": "fitting",
    "open_library": "cached_library",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
