"""The cache folder for what the project downloads and computes."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def cache_dir() -> Path:
    """The folder for models, scores and artifacts: ``$RAP_CACHE_DIR``, or the user's cache."""
    override = os.environ.get("RAP_CACHE_DIR")
    return Path(override).expanduser() if override else platformdirs.user_cache_path("rap-env")
