"""Mistakes in the settings of an agent."""

from __future__ import annotations

from rap_env.errors import RapError


class AgentConfigError(RapError, ValueError):
    """A setting of an agent whose value is impossible."""
