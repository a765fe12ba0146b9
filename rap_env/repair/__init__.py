"""Repair: a small stub in the place of a removed block. Importing it loads no torch.

The names below are imported from their modules on first use.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rap_env.repair.distilling import distill
    from rap_env.repair.fitting import FitConfig, fit_library
    from rap_env.repair.library import StubLibrary
    from rap_env.repair.opening import open_library
    from rap_env.repair.per_mask import fit_for_mask
    from rap_env.repair.trainer import DistillConfig

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

REPAIRS = ("none", "library")
"""What a setting ``repair`` may say; any other word is the path of a library's file."""

_MODULES = {
    "DistillConfig": "trainer",
    "FitConfig": "fitting",
    "StubLibrary": "library",
    "distill": "distilling",
    "fit_for_mask": "per_mask",
    "fit_library": "fitting",
    "open_library": "opening",
}


def repair_label(name: str) -> str:
    """What records call a setting ``repair``: a file by its name and folder, as texts are.

    >>> repair_label("some/where/runs/stubs.safetensors")
    'runs/stubs.safetensors'
    """
    return "/".join(Path(name).parts[-2:])


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
