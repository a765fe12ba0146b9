"""Errors of the experiments."""

from __future__ import annotations

from rap_env.errors import RapError


class ExperimentError(RapError, ValueError):
    """A setting, run folder or record is invalid."""
