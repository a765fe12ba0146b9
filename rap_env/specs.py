"""Specs: descriptions of parts of the environment as names, numbers and dicts.

A spec is a name (``"perplexity"``) or a dict with that ``name`` and settings
(``{"name": "perplexity", "timing": "dense"}``), so that it can come from YAML and
`gymnasium.make` can copy it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import fields
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from rap_env.errors import InvalidRequestError, RapError, check_name

_NUMBERS: dict[type, type] = {int: Integral, float: Real}  # includes those of NumPy


def split_spec(
    spec: str | Mapping[str, Any], kind: str, known: Iterable[str]
) -> tuple[str, dict[str, Any]]:
    """Split a spec (a name, or a dict with a ``name``) into name and settings.

    Raises:
        InvalidRequestError: The spec is neither a string nor a mapping.
        UnknownNameError: The name is missing or not among the `known` ones.
    """
    if not isinstance(spec, str | Mapping):
        raise InvalidRequestError(
            f"A {kind} must be a name, or a dict with a 'name' and settings, not {spec!r}."
        )
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


def check_types(
    owner: Any,
    error: type[RapError] = InvalidRequestError,
    *,
    least: Mapping[str, float] | None = None,
    none: str = "None",
) -> None:
    """Check the fields of a dataclass against their annotations; NumPy numbers become Python's.

    Args:
        owner: The dataclass. An integer is allowed where a float is; a bool is not a number.
        error: Class of the error.
        least: The least value of some fields.
        none: What messages call None.

    Raises:
        RapError: The value of a field has another type, or is too small or infinite.
    """
    for name, types in field_types(type(owner)).items():
        value = getattr(owner, name)
        allowed = tuple(_NUMBERS.get(kind, kind) for kind in types)
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in types):
            words = " or ".join(none if kind is NoneType else kind.__name__ for kind in types)
            raise error(f"{name} must be of type {words}, not {value!r}.")
        if isinstance(value, Real) and not isinstance(value, int | float):
            plain = int(value) if isinstance(value, Integral) else float(value)
            object.__setattr__(owner, name, plain)
        low = (least or {}).get(name)
        if low is not None and isinstance(value, int | float) and not low <= value < math.inf:
            range_ = f"{low} or above" if float in types else f"a whole number of at least {low}"
            also = f", or {none}" if NoneType in types else ""
            raise error(f"{name} must be {range_}{also}, not {value!r}.")


def field_types(owner: type) -> dict[str, tuple[type, ...]]:
    """Types that each field of a dataclass accepts, by its name."""
    hints = get_type_hints(owner)
    types: dict[str, tuple[type, ...]] = {}
    for entry in fields(owner):
        hint = hints[entry.name]
        kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        types[entry.name] = tuple(get_origin(kind) or kind for kind in kinds)
    return types
