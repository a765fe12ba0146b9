"""Policies by name and by kind of file. Each registers itself in the file that defines it."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

from rap_env.memory import MemoryModel
from rap_env.policies.base import Policy
from rap_env.policies.method import Basis, Method
from rap_env.policies.packaged_files import packaged_basis

MethodT = TypeVar("MethodT", bound=type[Method])
Maker = Callable[[MemoryModel, Basis | None], Policy]
Reader = Callable[[Path, MemoryModel], Policy]
MakerT = TypeVar("MakerT", bound=Callable[..., Policy])

_METHODS: dict[str, Maker] = {}
_READERS: dict[str, Reader] = {}


def register(method: MethodT) -> MethodT:
    """Register a method under its name, as a class decorator.

    Without a basis it chooses on the scores and over the levels that the package has.
    """
    _METHODS[method.name] = lambda memory, basis: method(basis or packaged_basis(memory))
    return method


def makes(name: str) -> Callable[[MakerT], MakerT]:
    """Register what makes a policy of this name from the byte arithmetic of a model and a basis.

    In a comparison the policy may be made from the basis; without one, from files in the
    package.
    """
    return partial(_register, _METHODS, name)


def reads(kind: str) -> Callable[[MakerT], MakerT]:
    """Register what makes policies from files of this kind (`rap_env.artifacts`)."""
    return partial(_register, _READERS, kind)


def _register(registry: dict[str, Any], name: str, maker: MakerT) -> MakerT:
    registry[name] = maker
    return maker


def methods() -> Mapping[str, Maker]:
    """What makes all policies, by name: from a basis, or from what the package has."""
    _import_all()
    return _METHODS


def readers() -> Mapping[str, Reader]:
    """What makes policies from files, by the kind of file."""
    _import_all()
    return _READERS


def policy_names() -> list[str]:
    """The names of all policies of this package, sorted."""
    return sorted(methods())


@cache
def _import_all() -> None:
    """Import every file of this room, so that all policies are registered."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f"{__package__}.{module.name}")
