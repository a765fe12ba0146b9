"""Progress bars for downloads and conversions: on a terminal, and not elsewhere."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm


def progress_bar(shown: bool, items: Iterable[Any] | None = None, **options: Any) -> tqdm[Any]:
    """Return a progress bar that is drawn if it is wanted and there is a terminal.

    Args:
        shown: Whether it is wanted.
        items: What it iterates over, if anything.
        **options: As for tqdm.
    """
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


@contextlib.contextmanager
def hub_bars(*, shown: bool) -> Iterator[None]:
    """Hide the hub client's own progress bars unless `shown`; their setting is restored."""
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextlib.contextmanager
def growing_folder_bar(
    folder: Path, total_bytes: int, title: str, *, shown: bool = True
) -> Iterator[None]:
    """Show a bar of the bytes that another program writes below a folder, on a terminal."""
    done = threading.Event()
    with progress_bar(
        shown, desc=title, total=total_bytes, unit="B", unit_scale=True, leave=False
    ) as bar:

        def watch() -> None:
            while not done.wait(0.2):
                bar.update(min(folder_bytes(folder), total_bytes) - bar.n)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; 0 if there is none."""
    total = 0
    # Files and folders may vanish while they are counted; os.walk skips those.
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += Path(place, name).stat().st_size
    return total
