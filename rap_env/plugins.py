"""Policies and agents of other packages, named as ``package.module:name``."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rap_env.errors import RapError, UnknownNameError

_REFERENCE = re.compile(r"[^\W\d][\w.]*:[^\W\d]\w*")
_HINT = "Something of another package can also be named as package.module:name."


class PluginError(RapError, ImportError):
    """A policy or agent of another package cannot be loaded or used."""


@dataclass(frozen=True)
class Plugin:
    """A policy or agent of another package, which is not imported yet.

    Attributes:
        kind: ``"policy"`` or ``"agent"``.
        name: The name by which it was found.
        module: The module that defines it.
        attribute: Its name in that module.
    """

    kind: str
    name: str
    module: str
    attribute: str

    def __str__(self) -> str:
        return f"The {self.kind} {self.name!r}"

    @property
    def source_sha256(self) -> str:
        """Hash of the file that defines it, in hex."""
        path = inspect.getsourcefile(importlib.import_module(self.module))
        return hashlib.sha256(Path(path or "").read_bytes()).hexdigest() if path else ""

    def load(self) -> Any:
        """Import it.

        Raises:
            PluginError: The import fails.
        """
        try:
            return getattr(importlib.import_module(self.module), self.attribute)
        except Exception as error:  # whatever the other package raises
            raise PluginError(
                f"{self} cannot be loaded: {type(error).__name__}: {error}"
            ) from error

    def make(self, *arguments: Any) -> Any:
        """Call it as a factory.

        Raises:
            PluginError: It cannot be loaded, or does not take these arguments.
        """
        factory = self.load()
        try:
            inspect.signature(factory).bind(*arguments)
        except (TypeError, ValueError) as error:
            kinds = ", ".join(type(argument).__name__ for argument in arguments)
            raise PluginError(f"{self} cannot be called with ({kinds}): {error}.") from None
        return factory(*arguments)


def find_plugin(kind: str, name: str, own: Iterable[str], hint: str = _HINT) -> Plugin:
    """What another package has under a name that is none of this project's.

    Args:
        kind: ``"policy"`` or ``"agent"``.
        name: A name such as ``package.module:name``.
        own: Names of this project, for the error.
        hint: End of the error.

    Raises:
        UnknownNameError: It has another form.
    """
    if not _REFERENCE.fullmatch(name):
        raise UnknownNameError(kind, name, own, hint)
    module, _, attribute = name.partition(":")
    return Plugin(kind, name, module, attribute)
