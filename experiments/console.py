"""What a person sees in the terminal: lines that do not tear progress bars."""

from __future__ import annotations

import logging
import sys
from typing import TextIO

from tqdm import tqdm


class TqdmHandler(logging.StreamHandler[TextIO]):
    """A stream handler whose lines stand above any progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        try:
            tqdm.write(self.format(record), file=self.stream)
        except Exception:  # as in logging.StreamHandler: a log line must never end a run
            self.handleError(record)


def say(text: str) -> None:
    """Write a line for the person who ran the program, above any progress bar."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()
