"""Log lines of a server: text or JSON, to standard error or to a file that is rotated."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from collections.abc import Iterator
from logging.handlers import RotatingFileHandler

from rap_env.errors import ServingSettingsError
from rap_env.serving.settings import ServerSettings

_TEXT = "%(asctime)s.%(msecs)03dZ %(levelname)s %(message)s"
_TIME = "%Y-%m-%dT%H:%M:%S"


class TextFormatter(logging.Formatter):
    """A line with time (UTC), level and message; a traceback follows in lines of its own."""

    def __init__(self) -> None:
        super().__init__(_TEXT, _TIME)
        self.converter = time.gmtime


class JsonFormatter(TextFormatter):
    """A JSON object per line: ``time``, ``level``, ``logger`` and ``message``.

    A record's ``fields``, given as ``extra={"fields": {...}}``, are further keys, and a traceback
    is in ``exception``.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        entry = {
            "time": f"{self.formatTime(record, _TIME)}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


class LogFile(RotatingFileHandler):
    """A file that becomes ``NAME.1`` and so on when it is full; lines that fail are left out.

    The first failure, such as a full disk, is one line on standard error.

    Attributes:
        lost: Number of lines that could not be written.
    """

    lost = 0

    def handleError(self, record: logging.LogRecord) -> None:
        """Count a line that could not be written."""
        if not self.lost:
            print(
                f"Lines can no longer be logged in {self.baseFilename}: {sys.exc_info()[1]}",
                file=sys.stderr,
            )
        self.lost += 1


@contextlib.contextmanager
def server_logging(settings: ServerSettings) -> Iterator[None]:
    """Log as the settings say, within a ``with`` block.

    The process's handlers for the console are replaced; others, such as files, stay.

    Raises:
        ServingSettingsError: The log file cannot be opened.
    """
    root, package = logging.getLogger(), logging.getLogger("rap_env")
    level = settings.log_level.upper()
    before, package_level = root.handlers[:], package.level
    handler = _handler(settings)
    handler.setFormatter(JsonFormatter() if settings.log_format == "json" else TextFormatter())
    handler.setLevel(level)
    package.setLevel(level)
    root.handlers[:] = [*(h for h in before if type(h) is not logging.StreamHandler), handler]
    try:
        yield
    finally:
        root.handlers[:] = before
        package.setLevel(package_level)
        handler.close()


def _handler(settings: ServerSettings) -> logging.Handler:
    if settings.log_file is None:
        return logging.StreamHandler()
    try:
        return LogFile(
            settings.log_file,
            maxBytes=settings.log_file_max_bytes,
            backupCount=settings.log_file_count,
            encoding="utf-8",
        )
    except OSError as error:
        raise ServingSettingsError(
            f"Cannot write log_file {settings.log_file}: {error.strerror}; give the path of a file "
            "in a folder that exists and that the server may write to."
        ) from None
