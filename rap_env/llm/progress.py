"""What is seen of a slow step: bars on a terminal, none elsewhere."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm


@contextlib.contextmanager
def transformers_bars(*, shown: bool) -> Iterator[None]:
    """Show or hide transformers' own progress bars; their setting is put back afterwards."""
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


@contextlib.contextmanager
def growing_folder_bar(folder: Path, total_bytes: int, title: str) -> Iterator[None]:
    """A bar of the bytes that another program writes into a folder.

    Args:
        folder: The folder; everything below it counts.
        total_bytes: How many are expected.
        title: Stands before the bar.
    """
    done = threading.Event()
    with tqdm(
        desc=title, total=total_bytes, unit="B", unit_scale=True, leave=False, disable=None
    ) as bar:

        def watch() -> None:
            while not done.wait(0.2):
                bar.update(min(_bytes_in(folder), total_bytes) - bar.n)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()


def _bytes_in(folder: Path) -> int:
    total = 0
    # Files and folders may be gone by the time they are looked at; os.walk passes over those.
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += Path(place, name).stat().st_size
    return total
