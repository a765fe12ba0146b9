"""Specs: descriptions of parts of the environment as names, numbers and dicts.

A spec is a name (``"perplexity"``) or a dict with that ``name`` and settings
(``{"name": "perplexity", "timing": "dense"}``), so that it can come from YAML and
`gymnasium.make` can copy it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rap_env.errors import check_name


def split_spec(
    spec: str | Mapping[str, Any], kind: str, known: Iterable[str]
) -> tuple[str, dict[str, Any]]:
    """Split a spec (a name, or a dict with a ``name``) into name and settings.

    Raises:
        UnknownNameError: The name is missing or not among the `known` ones.
    """
    settings: dict[str, Any] = {"name": spec} if isinstance(spec, str) else dict(spec)
    name, known = settings.pop("name", None), list(known)
    check_name(kind, name, known)
    return str(name), settings


def check_settings(settings: Mapping[str, Any], owner: str, known: Iterable[str]) -> None:
    """Reject a setting that `owner` (``"the sampler 'fixed'"``) does not have.

    Raises:
        UnknownNameError: A key is not among the `known` ones.
    """
    known = list(known)
    for key in settings:
        check_name(f"setting of {owner}:", key, known)
