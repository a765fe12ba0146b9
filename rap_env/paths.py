"""The cache folder for what the project downloads and computes, and sizes on the disk."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def cache_dir() -> Path:
    """The folder for models, scores and artifacts: ``$RAP_CACHE_DIR``, or the user's cache."""
    users = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("RAP_CACHE_DIR") or f"{users}/rap-env").expanduser()


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; 0 if there is none."""
    total = 0
    # Files and folders may vanish while they are counted; os.walk skips those.
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += Path(place, name).stat().st_size
    return total
