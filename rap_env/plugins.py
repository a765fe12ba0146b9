"""Policies and agents of other packages.

A package offers them as entry points of the groups in `GROUPS`; anything that can be imported
is also found as ``package.module:name``. Names of this project come first, then entry points.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

from rap_env.errors import RapError, UnknownNameError

GROUPS = {
    "policy": "rap_env.policies",
    "agent": "rap_env.agents",
}
"""Group of entry points for each kind of plugin."""

_REFERENCE = re.compile(r"[^\W\d][\w.]*:[^\W\d]\w*")
_HINT = "Something of another package can also be named as package.module:name."


class PluginError(RapError, ImportError):
    """A policy or agent of another package cannot be loaded or used."""


@dataclass(frozen=True)
class Plugin:
    """A policy or agent of another package, which is not imported yet.

    Attributes:
        kind: One of `GROUPS`.
        name: The name by which it was found.
        package: The package with its version, or the module if there is no entry point.
        module: The module that defines it.
        attribute: Its name in that module.
    """

    kind: str
    name: str
    package: str
    module: str
    attribute: str

    def __str__(self) -> str:
        return f"The {self.kind} {self.name!r} of {self.package}"

    @property
    def conf(self) -> Path | None:
        """Folder with the package's YAML files for Hydra; None if it has none."""
        spec = util.find_spec(self.module.partition(".")[0])
        if spec is None:
            return None
        places = spec.submodule_search_locations or [str(Path(spec.origin or "").parent)]
        folder = Path(next(iter(places))) / "conf"
        return folder if folder.is_dir() else None

    @property
    def values_file(self) -> Path | None:
        """The YAML file of an agent's values; None if the package has none."""
        stem = self.attribute if ":" in self.name else self.name
        path = (self.conf or Path()) / self.kind / f"{stem}.yaml"
        return path if self.conf and path.is_file() else None

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
                f"{self} ({self.module}:{self.attribute}) cannot be loaded: "
                f"{type(error).__name__}: {error}"
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
    """Find what another package offers under a name that is none of this project's.

    Args:
        kind: One of `GROUPS`.
        name: Name of an entry point, or ``package.module:name``.
        own: Names of this project, for the error.
        hint: End of the error.

    Raises:
        UnknownNameError: Nothing has this name.
        PluginError: Several packages offer this name.
    """
    offered = entry_points(kind)
    plugins = [plugin for plugin in offered if plugin.name == name]
    if len(plugins) > 1:
        packages = " and ".join(sorted(plugin.package for plugin in plugins))
        raise PluginError(
            f"{packages} both offer the {kind} {name!r}; uninstall one, or name it as "
            f"{plugins[0].module}:{plugins[0].attribute}."
        )
    if plugins:
        return plugins[0]
    if _REFERENCE.fullmatch(name):
        module, _, attribute = name.partition(":")
        return Plugin(kind, name, f"the module {module}", module, attribute)
    raise UnknownNameError(kind, name, [*own, *(plugin.name for plugin in offered)], hint)


def entry_points(kind: str) -> list[Plugin]:
    """Return what installed packages offer, sorted by name."""
    plugins = []
    for point in metadata.entry_points(group=GROUPS[kind]):
        assert point.dist is not None  # it was found in an installed package
        package = f"the package {point.dist.name} {point.dist.version}"
        plugins.append(Plugin(kind, point.name, package, point.module, point.attr))
    return sorted(plugins, key=lambda plugin: (plugin.name, plugin.package))
