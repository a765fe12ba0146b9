"""Policies by name and by kind of file. Each registers itself in the file that defines it."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

from rap_env.memory import MemoryModel
from rap_env.policies.base import Policy
from rap_env.policies.method import Method

MethodT = TypeVar("MethodT", bound=type[Method])
Factory = Callable[[MemoryModel], Policy]
Reader = Callable[[Path, MemoryModel], Policy]
FactoryT = TypeVar("FactoryT", bound=Factory)
ReaderT = TypeVar("ReaderT", bound=Reader)
MakerT = TypeVar("MakerT")

_METHODS: dict[str, type[Method]] = {}
_PACKAGED: dict[str, Factory] = {}
_READERS: dict[str, Reader] = {}


def register(method: MethodT) -> MethodT:
    """Register a method under its name, as a class decorator."""
    _METHODS[method.name] = method
    return method


def packaged(*names: str) -> Callable[[FactoryT], FactoryT]:
    """Register what makes policies of these names from the byte arithmetic of a model."""
    return partial(_register, _PACKAGED, names)


def reads(kind: str) -> Callable[[ReaderT], ReaderT]:
    """Register what makes policies from files of this kind (`rap_env.artifacts`)."""
    return partial(_register, _READERS, (kind,))


def _register(registry: dict[str, Any], names: Sequence[str], maker: MakerT) -> MakerT:
    registry.update(dict.fromkeys(names, maker))
    return maker


def methods() -> Mapping[str, type[Method]]:
    """All methods by name; they are made from a context."""
    _import_all()
    return _METHODS


def packaged_policies() -> Mapping[str, Factory]:
    """What makes the packaged policies, by name; they need a model's byte arithmetic alone."""
    _import_all()
    return _PACKAGED


def readers() -> Mapping[str, Reader]:
    """What makes policies from files, by the kind of file."""
    _import_all()
    return _READERS


def policy_names() -> list[str]:
    """The names of all policies of this package, sorted."""
    return sorted({*methods(), *packaged_policies()})


@cache
def _import_all() -> None:
    """Import every file of this room, so that all policies are registered."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f"{__package__}.{module.name}")
