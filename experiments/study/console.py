"""Terminal output: log lines, messages and errors."""

from __future__ import annotations

import logging
import sys
from typing import NoReturn, TextIO

from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm

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
