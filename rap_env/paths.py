"""The cache folder for what the project downloads and computes, and sizes on the disk."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def cache_dir() -> Path:
    """The folder for models, scores and artifacts: ``$RAP_CACHE_DIR``, or the user's cache."""
    users = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("RAP_CACHE_DIR") or f"{users}/rap-env").expanduser()


COSTS_FILE, LEVELS_FILE = "costs.json", "levels.json"
"""Files in a `prepared_dir`: the costs of levels, and the names of weights that a text made."""


def any_prepared() -> bool:
    """Whether any model has levels that `rap prepare` made on this machine."""
    return any(cache_dir().glob(f"prepared/*/{LEVELS_FILE}"))


def prepared_dir(fingerprint: str) -> Path:
    """The folder of what a model was prepared with, by its fingerprint."""
    return cache_dir() / "prepared" / fingerprint[:16]


def calibrated_dir(fingerprint: str, calibration: str) -> Path:
    """The folder of the weights of a model that a text made.

    Args:
        fingerprint: Of the model.
        calibration: Hash of the text, as in `ElasticLLM.calibration`.
    """
    return cache_dir() / "calibrated" / f"{fingerprint[:16]}-{calibration[:16]}"


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; 0 if there is none."""
    total = 0
    # Files and folders may vanish while they are counted; os.walk skips those.
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += Path(place, name).stat().st_size
    return total
