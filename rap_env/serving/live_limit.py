"""A memory limit that operators change while the server runs: by a file, a request or a signal."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from rap_env.errors import ServingSettingsError
from rap_env.serving.settings import parse_bytes

log = logging.getLogger(__name__)

LimitSource = Literal["setting", "file", "admin"]
"""What set a limit last: a setting, the file, or a request of an administrator."""

_SETTLE_S = 0.05  # for which a file must be unchanged: a half-written one changes again
_LONGEST_TEXT = 64

_FileState = tuple[int, int, int] | None


class LiveLimit:
    """A number of bytes; call it to get the present one. The last change holds, from any source.

    Args:
        name: The setting that it is: ``memory`` or ``model_memory``.
        limit_bytes: Value of the setting.
        file: A file with a size such as ``300MiB``, which is read whenever it changes; None for
            none. As long as it does not exist the limit stays as it is. A file that is incomplete,
            wrong or too small changes nothing, and one warning is logged.

    Attributes:
        name: The setting that it is.
        setting_bytes: Value of the setting, as last read.
        source: What set the present value.
        check: Raises a `ServingSettingsError` for a number of bytes that is too small.

    Raises:
        ServingSettingsError: The file exists and does not hold a size.
    """

    def __init__(self, name: str, limit_bytes: int, file: str | None = None) -> None:
        self.name = name
        self.source: LimitSource = "setting"
        self.check: Callable[[int], None] = lambda limit_bytes: None
        self._bytes = self.setting_bytes = limit_bytes
        self._file = None if file is None else Path(file)
        self._lock = threading.RLock()
        self._seen = self._read_state = self._state()
        self._seen_s = time.monotonic()
        if self._seen is not None:
            self.set(self._read(), "file")

    def __call__(self) -> int:
        """The bytes that are allowed now."""
        if self._file is not None:
            with self._lock:
                self._follow()
        return self._bytes

    def set(self, limit_bytes: int, source: LimitSource) -> None:
        """Change the limit.

        Args:
            limit_bytes: The new limit.
            source: What changes it.

        Raises:
            ServingSettingsError: It is too small; the limit stays as it was.
        """
        self.check(limit_bytes)
        with self._lock:
            if (limit_bytes, source) != (self._bytes, self.source):
                log.info("%s is now %d bytes (%s).", self.name, limit_bytes, source)
            self._bytes, self.source = limit_bytes, source
            if source == "setting":
                self.setting_bytes = limit_bytes

    def _follow(self) -> None:
        """Read the file if it has changed, once it stays as it is for a moment.

        The moment counts from the time that the file itself has of its last change, so that one
        look is enough where looks are far apart.
        """
        state, now_s = self._state(), time.monotonic()
        if state != self._seen:
            self._seen, self._seen_s = state, now_s
        if state == self._read_state:
            return
        age_s = 0.0 if state is None else time.time() - state[2] / 1e9
        if max(age_s, now_s - self._seen_s) < _SETTLE_S:
            return
        self._read_state = state
        try:
            self.set(self._read(), "file")
        except ServingSettingsError as error:
            log.warning("%s stays at %d bytes: %s", self.name, self._bytes, error)

    def _state(self) -> _FileState:
        """What changes with the content of the file; None if there is none."""
        if self._file is None:
            return None
        try:
            found = self._file.stat()
        except OSError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns

    def _read(self) -> int:
        """The size in the file.

        Raises:
            ServingSettingsError: The file cannot be read, or holds no size.
        """
        assert self._file is not None
        try:
            with self._file.open("rb") as file:
                text = file.read(_LONGEST_TEXT + 1).decode("ascii", errors="replace")
        except OSError as error:
            raise ServingSettingsError(
                f"Cannot read memory_file {self._file}: {error.strerror}."
            ) from None
        if len(text) > _LONGEST_TEXT:
            text = f"{text[:_LONGEST_TEXT]}..."
        return parse_bytes(f"memory_file {self._file}", text)
