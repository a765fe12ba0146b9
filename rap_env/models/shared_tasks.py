"""Tasks that processes share by files in a folder: a claim and a result for each.

A task is done by the process that made its claim; the others read its result.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rap_env.artifacts import load_artifact, save_artifact
from rap_env.models.device import return_freed_memory
from rap_env.models.files.model_folder import in_child

KIND, FORMAT = "part of a preparation", 1
"""Of the files of results."""

Check = Callable[[], object]
Note = Callable[[str, float], object]

_WAIT_S = 0.05


class Tasks:
    """Tasks that processes share by files in a folder: one for a claim, one for a result.

    Args:
        folder: The folder.
        check: Called while it waits; raises an error if other processes have ended.
        note: Called with the name of a group of tasks and the share of it that is done.
    """

    def __init__(
        self,
        folder: Path,
        check: Check = lambda: None,
        note: Note = lambda group, share: None,
    ) -> None:
        self.folder, self._check, self._note = folder, check, note

    def run(
        self, group: str, count: int, do: Callable[[int], dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """Do those tasks of a group that no other process has claimed; the results of all.

        Args:
            group: Name of the group.
            count: Number of tasks, which are done in their order.
            do: Returns the result of a task.
        """
        paths = [self.folder / f"{group}-{number:03d}.json" for number in range(count)]
        for number, path in enumerate(paths):
            self._check()
            self._note(group, sum(path.exists() for path in paths) / count)
            if not path.exists() and _claimed(path):
                save_artifact(path, KIND, FORMAT, do(number))
                return_freed_memory()
        for path in paths:
            self.wait(path)
            self._note(group, sum(path.exists() for path in paths) / count)
        return [load_artifact(path, KIND, FORMAT) for path in paths]

    def wait(self, path: Path) -> None:
        """Wait until another process has written a file."""
        while not path.exists():
            self._check()
            time.sleep(_WAIT_S)


def _claimed(path: Path) -> bool:
    """Claim a task for this process, unless another one has it."""
    try:
        path.with_suffix(".claim").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def keep_usable(folder: Path) -> None:
    """Remove claims of a run that was ended, and results of layers that it cannot go on from."""
    for claim in folder.glob("*.claim"):
        claim.unlink()
    states = {_number(path): path for path in folder.glob("states-*.safetensors")}
    results = {_number(path): path for path in folder.glob("levels-*.json")}
    first = next(number for number in itertools.count() if number not in results)
    start = max((number for number in states if number <= first), default=0)
    for number, path in results.items():
        if number >= start:
            path.unlink()
    for number, path in states.items():
        if number > start:
            path.unlink()


def _number(path: Path) -> int:
    return int(path.stem.partition("-")[2])


@contextlib.contextmanager
def helpers(
    folder: Path, work: Callable[[Check, Note], object], workers: int
) -> Iterator[Callable[[], None]]:
    """Start the other processes that share the tasks of a folder.

    Args:
        folder: The folder.
        work: What each process does, with the arguments of its `Tasks`; it can be pickled.
        workers: Number of processes, this one included.

    Yields:
        A check that raises their errors.

    Raises:
        ModelNotAvailableError: One of them was ended from outside.
    """
    stop = folder / "stop"
    stop.unlink(missing_ok=True)
    if workers == 1:
        yield lambda: None
        return
    with ThreadPoolExecutor(workers - 1) as pool:
        futures = [
            pool.submit(in_child, _help, folder, work, os.getpid()) for _ in range(workers - 1)
        ]
        try:
            yield lambda: _raise_errors(futures)
            _raise_errors(futures, wait=True)
        finally:
            with contextlib.suppress(OSError):
                stop.touch()


def _raise_errors(futures: Sequence[Future[None]], *, wait: bool = False) -> None:
    for future in futures:
        if wait or future.done():
            future.result()


def _help(folder: Path, work: Callable[[Check, Note], object], parent: int) -> None:
    """What another process than the first one does, until that one ends."""

    def check() -> None:
        if (folder / "stop").exists() or os.getppid() != parent:
            raise SystemExit(1)

    work(check, lambda group, share: None)
