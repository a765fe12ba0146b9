"""Progress of conversions and measurements: bars on a terminal, log lines elsewhere."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from time import monotonic
from typing import Any

from tqdm import tqdm

LOG_SECONDS = 10.0
"""Seconds between two lines about a bar where there is no terminal."""

log = logging.getLogger(__name__)


class LoggedBar(tqdm):  # type: ignore[type-arg]  # it has no parameters at run time
    """A progress bar that logs a line every `LOG_SECONDS` instead of being drawn."""

    def __init__(self, items: Iterable[Any] | None = None, **options: Any) -> None:
        self._logged_at: float | None = None
        ours = {"file": io.StringIO(), "mininterval": LOG_SECONDS, "miniters": 1, "leave": False}
        text = "{desc}: {n_fmt}/{total_fmt} {unit} [{elapsed}<{remaining}{postfix}]"
        super().__init__(items, **{**options, **ours, "bar_format": text})

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Log the state if the last line is long enough ago; a `msg` clears a bar."""
        now = monotonic()
        if self._logged_at is None:
            self._logged_at = now  # short work needs no line
        if msg is None and now - self._logged_at >= LOG_SECONDS:
            self._logged_at = now
            # Without any handler, Python shows warnings and nothing below them.
            log.log(logging.INFO if log.hasHandlers() else logging.WARNING, str(self))


def progress_bar(shown: bool, items: Iterable[Any] | None = None, **options: Any) -> tqdm[Any]:
    """Return a progress bar, if it is wanted: drawn on a terminal, else one that logs.

    Args:
        shown: Whether it is wanted.
        items: What it iterates over, if anything.
        **options: As for tqdm.
    """
    if shown and not (sys.stderr is not None and sys.stderr.isatty()):
        return LoggedBar(items, **options)
    return tqdm(items, dynamic_ncols=True, disable=None if shown else True, **options)


@contextlib.contextmanager
def transformers_bars(*, shown: bool) -> Iterator[None]:
    """Show or hide transformers' own progress bars; their setting is restored afterwards."""
    from transformers.utils import logging

    switch: dict[bool, Callable[[], None]] = {
        True: logging.enable_progress_bar,
        False: logging.disable_progress_bar,
    }
    before = logging.is_progress_bar_enabled()
    switch[shown]()
    try:
        yield
    finally:
        switch[before]()
