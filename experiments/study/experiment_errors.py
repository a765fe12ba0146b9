"""Errors of the experiments."""

from __future__ import annotations

from rap_env.errors import MissingDependencyError, RapError


class ExperimentError(RapError, ValueError):
    """A setting, run folder or record is invalid."""


class MissingGroupError(MissingDependencyError):
    """A package of a dependency group of the checkout is not installed."""

    def __init__(self, package: str, feature: str, group: str) -> None:
        self._made_from = (package, feature, group)
        RapError.__init__(
            self,
            f"{feature} needs the package {package!r}; install it in the checkout with "
            f"`pip install --group {group}`.",
        )
