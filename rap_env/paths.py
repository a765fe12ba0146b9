"""The cache folder for what the project downloads and computes."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """The folder for models, scores and artifacts: ``$RAP_CACHE_DIR``, or the user's cache."""
    users = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("RAP_CACHE_DIR") or f"{users}/rap-env").expanduser()
