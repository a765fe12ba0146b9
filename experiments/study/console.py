"""The terminal: log lines, messages, settings of a command; errors of the experiments."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TextIO, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm

from rap_env.errors import MissingDependencyError, RapError

T = TypeVar("T")

EXIT_CODE = 2
"""Exit code of an error that its message explains."""


class TqdmHandler(logging.StreamHandler[TextIO]):
    """A log handler that prints above progress bars. ``conf/config.yaml`` installs it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        try:
            tqdm.write(self.format(record), file=self.stream)
        except Exception:  # as in logging.StreamHandler: a log line must never end a run
            self.handleError(record)


def say(text: str) -> None:
    """Print a line to the standard output, above any progress bar."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def fail(text: str) -> NoReturn:
    """Print an error and exit with `EXIT_CODE`."""
    sys.stderr.write(f"Error: {text}\n")
    sys.exit(EXIT_CODE)


def message(error: BaseException) -> str:
    """The error's message, followed by its cause where only the cause names the key."""
    parts = [str(error).strip()]
    cause = error.__cause__
    if isinstance(cause, OmegaConfBaseException) and str(cause).strip() not in parts[0]:
        parts.append(str(cause).strip())
    return "\n".join(parts)


def run_with_settings(schema: type[T], run: Callable[[T], object]) -> None:
    """Run a program with the ``key=value`` settings of the command line; it makes no run folder.

    A misspelt key, a value of the wrong type and a `RapError` of `run` end the program with a
    message and exit code 2; ``--help`` prints the program's text and the default settings.

    Args:
        schema: The dataclass of its settings.
        run: Called with the settings.
    """
    words = sys.argv[1:]
    if {"-h", "--help"}.intersection(words):
        defaults = OmegaConf.to_yaml(OmegaConf.structured(schema))
        text = inspect.getdoc(inspect.getmodule(run))
        print(f"{text}\n\nSettings, given as key=value, and their defaults:\n\n{defaults}")
        return
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.from_cli(words))
        settings: Any = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, RapError, ValueError) as error:
        names = ", ".join(field.name for field in dataclasses.fields(schema))  # type: ignore[arg-type]
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        fail(f"{reason}. Settings are given as key=value; known are {names}.")
    try:
        run(settings)
    except RapError as error:
        fail(str(error))


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
