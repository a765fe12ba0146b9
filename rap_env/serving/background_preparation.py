"""Prepares the model that a server serves, in another process of the lowest priority."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

from rap_env.importance.preparation import process_bytes
from rap_env.memory import MemoryModel
from rap_env.models.device import resident_bytes
from rap_env.models.live.calibration import use_prepared_levels
from rap_env.policies.packaged_files import lacks_costs
from rap_env.request import mebibytes
from rap_env.runtime.memory_limit import LiveLimit
from rap_env.serving.served_model import choose_policy, floors_of
from rap_env.serving.settings import ServerSettings

if TYPE_CHECKING:
    from rap_env.runtime.controller import RuntimeController

log = logging.getLogger(__name__)

_LOWEST_PRIORITY = 19
_CHECK_S = 1.0  # between looks at the memory and at the process
_PROCESS_BYTES = 600 * 2**20  # of Python and torch


class BackgroundPreparation(threading.Thread):
    """Makes levels and costs of a served model while it serves natively, and then uses them.

    What preparing takes is set aside from a limit of the process. Without room it waits.

    Args:
        settings: Settings of the server.
        controller: Keeps the model within its memory.
        limit: The limit; None for the system's free memory.
    """

    def __init__(
        self, settings: ServerSettings, controller: RuntimeController, limit: LiveLimit | None
    ) -> None:
        super().__init__(name="rap-prepare", daemon=True)
        self._settings, self._controller = settings, controller
        self._limit = limit if limit is not None and limit.of_process else None
        self._need_bytes = _PROCESS_BYTES + process_bytes(controller.llm, thorough=False)
        self._ended = threading.Event()

    def close(self) -> None:
        """End the preparation; a later one continues where it was."""
        self._ended.set()
        if self.is_alive():
            self.join()

    def run(self) -> None:
        """Wait for memory, prepare the model, and use the result."""
        if not self._wait_for_room():
            return
        if self._limit is not None:
            self._limit.set_aside(self._need_bytes)
        try:
            error = self._prepare()
        finally:
            if self._limit is not None:
                self._limit.set_aside(0)
        if self._ended.is_set():
            return
        if error:
            log.warning("%s could not be prepared: %s", self._settings.model, error)
            return
        self._use()

    def _wait_for_room(self) -> bool:
        """Whether there is room for another process before the server ends."""
        waits = False
        limit = self._limit
        while limit is not None and limit() - resident_bytes()[1] < self._need_bytes:
            if not waits:
                log.info(
                    "Preparing %s waits until %s of the memory limit are free; `rap prepare %s` "
                    "prepares it beforehand.",
                    self._settings.model,
                    mebibytes(self._need_bytes),
                    self._settings.model,
                )
            waits = True
            if self._ended.wait(_CHECK_S):
                return False
        return True

    def _prepare(self) -> str:
        """Run `rap prepare` in a process of the lowest priority; the last line of its error."""
        settings = self._settings
        how = ["--device", settings.device, "--dtype", settings.dtype]
        command = [sys.executable, "-m", "rap_env.cli", "prepare", settings.model, *how]
        if self._limit is not None:
            command += ["--memory", str(self._need_bytes)]
        log.info("Preparing %s in the background.", settings.model)
        ignored, read = subprocess.DEVNULL, subprocess.PIPE
        with subprocess.Popen(command, stdout=ignored, stderr=read, text=True) as process:
            if hasattr(os, "setpriority"):
                os.setpriority(os.PRIO_PROCESS, process.pid, _LOWEST_PRIORITY)
            while True:
                try:
                    _, errors = process.communicate(timeout=_CHECK_S)
                    break
                except subprocess.TimeoutExpired:
                    if self._ended.is_set():
                        process.terminate()
        return "" if process.returncode == 0 else (errors.strip().splitlines() or ["ended"])[-1]

    def _use(self) -> None:
        """Serve with the levels that were made, from the next decision on."""
        llm = self._controller.llm
        with llm.exclusive():
            use_prepared_levels(llm, quick=True)
            policy = choose_policy(self._settings, llm, self._limit)
            self._controller.chooser.use_policy(policy, *floors_of(self._settings, policy))
        log.info("%s is prepared; its levels are used from now on.", self._settings.model)


def start_preparation(
    settings: ServerSettings, controller: RuntimeController, limit: LiveLimit | None
) -> BackgroundPreparation | None:
    """Start preparing a model that has no costs of levels, unless the settings forbid it."""
    if not settings.may_prepare or not lacks_costs(MemoryModel(controller.llm)):
        return None
    preparation = BackgroundPreparation(settings, controller, limit)
    preparation.start()
    return preparation
