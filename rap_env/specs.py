"""Settings with their allowed values, and specs of names, numbers and dicts.

Servers, environments, experiments and agents have their settings in dataclasses, whose fields
`setting` makes and whose values `check` checks.

A spec is a name (``"perplexity"``) or a dict with that ``name`` and settings
(``{"name": "perplexity", "timing": "dense"}``), so that it can come from YAML and
`gymnasium.make` can copy it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import MISSING, field, fields, is_dataclass
from functools import partial
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

from rap_env.errors import InvalidRequestError, RapError, check_name

# Numbers of NumPy as well.
_ACCEPTED: dict[Any, type] = {int: Integral, float: Real, Any: object}


class Setting(NamedTuple):
    """Description and allowed values of a setting; of a list, those of each entry.

    Attributes:
        help: What the setting is.
        low: The least number.
        high: The greatest number.
        above: What a number must be greater than.
        choices: The allowed names; empty allows any.
        kind: What messages call a name, such as ``"form of info"``; empty for the setting's
            name.
        parse: Raises a `RapError` if a text does not have the right form.
        distinct: Whether a list needs at least one entry, and none twice.
        group: Title of the group of settings that begins with this one, for the help of a
            command.
        types: The types that the annotation accepts.
    """

    help: str = ""
    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    choices: Collection[str] = ()
    kind: str = ""
    parse: Callable[[str], Any] | None = None
    distinct: bool = False
    group: str = ""
    types: tuple[Any, ...] = ()


def setting(default: Any = MISSING, help: str = "", **allowed: Any) -> Any:
    """Make a field for a dataclass of settings.

    Args:
        default: Its default; a list or dict is copied. Without one, a value must be given.
        help: What the setting is.
        allowed: Its allowed values, as in `Setting`; None is allowed if the annotation says
            so.
    """
    metadata = {"setting": Setting(help, **allowed)}
    if isinstance(default, list | dict):
        return field(default_factory=partial(copy.deepcopy, default), metadata=metadata)
    return field(default=default, metadata=metadata)


def settings_of(owner: type) -> dict[str, Setting]:
    """The settings of a dataclass by name; a field that `setting` did not make allows any value."""
    if owner in _SETTINGS:
        return _SETTINGS[owner]
    hints, settings = get_type_hints(owner), {}
    for entry in fields(owner):
        hint = hints[entry.name]
        kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        types = tuple(get_origin(kind) or kind for kind in kinds)
        settings[entry.name] = entry.metadata.get("setting", Setting())._replace(types=types)
    _SETTINGS[owner] = settings
    return settings


_SETTINGS: dict[type, dict[str, Setting]] = {}  # resolving annotations takes a third of a ms


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


def check(
    owner: Any,
    error: type[RapError] = InvalidRequestError,
    *,
    path: str = "",
    none: str = "None",
) -> None:
    """Check the fields of a dataclass, and of the dataclasses in it; NumPy numbers become Python's.

    Args:
        owner: The dataclass. An integer is allowed where a float is; a bool is not a number.
        error: Class of the error.
        path: What messages put before the name of a field, such as ``"evaluate."``.
        none: What messages call None.

    Raises:
        UnknownNameError: A name is not among the choices.
        RapError: A value has another type or form, or is out of range.
    """
    for name, rules in settings_of(type(owner)).items():
        value, types = getattr(owner, name), rules.types
        accepted = tuple(_ACCEPTED.get(kind, kind) for kind in types)
        is_flag = isinstance(value, bool) and not {bool, Any} & {*types}
        if not isinstance(value, accepted) or is_flag:
            words = " or ".join(none if kind is NoneType else kind.__name__ for kind in types)
            raise error(f"{path}{name} must be of type {words}, not {value!r}.")
        if isinstance(value, Real) and not isinstance(value, int | float):
            value = int(value) if isinstance(value, Integral) else float(value)
            object.__setattr__(owner, name, value)
        if isinstance(value, Mapping):
            for key, part in value.items():
                if is_dataclass(part):
                    check(part, error, path=f"{path}{name}.{key}.", none=none)
            continue
        entries = value if isinstance(value, list | tuple) else [value]
        if rules.distinct and (not entries or len(set(entries)) < len(entries)):
            raise error(f"{path}{name} must have at least one entry and none twice, not {value!r}.")
        for entry in entries:
            if is_dataclass(entry):
                check(entry, error, path=f"{path}{name}.", none=none)
            elif entry is not None and not _is_allowed(f"{path}{name}", entry, rules, error):
                also = f", or {none}" if NoneType in types else ""
                raise error(f"{path}{name} must be {_range(rules)}{also}, not {entry!r}.")


def _is_allowed(name: str, value: Any, rules: Setting, error: type[RapError]) -> bool:
    """Whether a number is in range; raises an error for a name or form that is not allowed."""
    is_number = isinstance(value, int | float)
    if rules.choices and not is_number:
        hint = "A number is allowed as well." if {int, float} & {*rules.types} else ""
        check_name(rules.kind or name, value, rules.choices, hint)
    elif rules.parse:
        try:
            rules.parse(value)
        except RapError as wrong:
            raise error(f"{name}: {wrong}") from None
    elif max(rules.low, rules.above) > -math.inf:
        in_range = is_number and rules.low <= value <= rules.high
        return in_range and rules.above < value < math.inf
    return True


def _range(rules: Setting) -> str:
    """The allowed numbers in words."""
    if rules.above > -math.inf:
        most = "" if rules.high == math.inf else f" and at most {rules.high}"
        return f"above {rules.above}{most}"
    if rules.high < math.inf:
        return f"from {rules.low} to {rules.high}"
    if float in rules.types:
        return f"{rules.low} or above"
    return f"a whole number of at least {rules.low}"
