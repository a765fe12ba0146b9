"""The package's extras: what each installs, and the one error for what is not installed."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from importlib import metadata
from importlib.util import find_spec

from rap_env.errors import MissingDependencyError

EXTRAS = {
    "eval": ("datasets", "lm_eval"),
    "model": ("torch", "transformers", "accelerate", "gguf", "huggingface_hub", "tqdm", "filelock"),
    "plots": ("matplotlib",),
    "serve": ("fastapi", "uvicorn", "prometheus_client", "jinja2"),
    "structured": ("llguidance",),
}
"""Modules that each extra of ``pyproject.toml`` provides."""


def package_versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of those packages that are installed, by name."""
    versions = {}
    for name in packages:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def missing_modules(extra: str) -> list[str]:
    """Return the modules of an extra that are not installed; nothing is imported."""
    return [module for module in EXTRAS[extra] if find_spec(module) is None]


def require_extra(extra: str, feature: str) -> None:
    """Check that an extra is installed, before a feature imports what it needs.

    Args:
        extra: A name of `EXTRAS`.
        feature: What needs it, as the subject of a sentence.

    Raises:
        MissingDependencyError: A module of it is missing; the error has the command that
            installs the extra.
    """
    missing = missing_modules(extra)
    if missing:
        raise MissingDependencyError(missing[0].replace("_", "-"), feature, extra)


def missing_extra(error: ModuleNotFoundError, feature: str) -> ImportError:
    """Return the error to raise for a failed import: the module's extra, where it has one."""
    module = (error.name or "").partition(".")[0]
    for extra, modules in EXTRAS.items():
        if module in modules:
            return MissingDependencyError(module.replace("_", "-"), feature, extra)
    return error
