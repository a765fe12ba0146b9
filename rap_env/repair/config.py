"""Settings of repair, readable without torch."""

from __future__ import annotations

from pathlib import Path

from rap_env.errors import check_name

REPAIRS = ("none", "library")
"""Words that the setting ``repair`` accepts; any other value is the path of a stub library."""

NO_LIBRARY = (
    "Any other value is the path of a stub library, written by "
    "rap_env.repair.fitting.fit_library(...).save(path); there is no such file."
)
"""The end of the message about a name that is neither one of them nor a file."""


def check_repair(name: str) -> None:
    """Raise an `UnknownNameError` unless it is one of `REPAIRS` or a file."""
    if not Path(name).expanduser().is_file():
        check_name("repair", name, REPAIRS, NO_LIBRARY)


def repair_label(name: str) -> str:
    """Name of a setting ``repair`` in records: a file by its name and folder, as texts are.

    >>> repair_label("some/where/runs/stubs.safetensors")
    'runs/stubs.safetensors'
    """
    return "/".join(Path(name).parts[-2:])
